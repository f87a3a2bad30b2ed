"""How the options of `from_pretrained` reach what the quantizer downloads, and where a token must not go."""

import copy
import pickle
from types import SimpleNamespace

from optimum_qvlm.hf.access import Access, unwatch_access, watch_access
from optimum_qvlm.hf.saving.source import Source

SECRET = "hf_secret"


class Model:
    """What transformers calls between loading weights and asking the quantizer."""

    def __init__(self):
        self.calls = []

    def adjust_generation_fn(self, *args, **kwargs):
        self.calls.append((args, kwargs))
        return "adjusted"


def test_the_options_are_noted_and_passed_on():
    """The model must find its generation files as it would without us."""
    model, noted = Model(), []
    options = {"token": SECRET, "cache_dir": "cache", "local_files_only": True, "trust_remote_code": True}
    options["revision"] = "v2"

    watch_access(model, noted.append)

    assert model.adjust_generation_fn(None, "name", **options) == "adjusted"
    assert model.calls == [((None, "name"), options)]
    assert noted == [Access(token=SECRET, cache_dir="cache", local_files_only=True, trust_remote_code=True, told=True)]


def test_the_stand_in_is_gone_after_one_call():
    """A model with a function of ours in it could not be pickled."""
    model, noted = Model(), []
    watch_access(model, noted.append)
    model.adjust_generation_fn()

    model.adjust_generation_fn(token=SECRET)

    assert noted == [Access(told=True)]
    assert list(vars(model)) == ["calls"]


def test_the_stand_in_is_removed_uncalled():
    model = Model()
    watch_access(model, lambda access: None)

    unwatch_access(model)
    unwatch_access(model)

    assert list(vars(model)) == ["calls"]


def test_a_model_that_cannot_generate_is_left_alone():
    model = SimpleNamespace()

    watch_access(model, lambda access: None)
    unwatch_access(model)

    assert vars(model) == {}


def test_a_token_is_not_printed():
    """A traceback or log with a source in it may be public."""
    source = Source(folder="x", access=Access(token=SECRET))

    assert SECRET not in repr(source)


def test_a_token_is_not_pickled():
    """A model that somebody pickles carries its source."""
    source = Source(folder="x", access=Access(token=SECRET, cache_dir="cache", local_files_only=True))

    data = pickle.dumps(source)

    assert SECRET.encode() not in data
    assert pickle.loads(data).access == Access(cache_dir="cache", local_files_only=True)


def test_a_copy_keeps_the_token():
    """A deep copy of a model can be saved as the model can."""
    source = Source(folder="x", access=Access(token=SECRET))

    assert copy.deepcopy(source).access.options()["token"] == SECRET


def test_trust_is_not_pickled():
    """It was given to one call; whoever opens the pickle was not asked."""
    source = Source(folder="x", access=Access(trust_remote_code=True))

    assert pickle.loads(pickle.dumps(source)).access == Access()
