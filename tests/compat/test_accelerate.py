"""The parts of accelerate that we touch are as we take them to be."""

import pytest
import torch
from accelerate import cpu_offload, dispatch_model
from accelerate.hooks import ModelHook, SequentialHook
from torch import nn

from optimum_qvlm.compat import accelerate as compat
from tests.compat.contract import contract

pytestmark = pytest.mark.integration


def small_model():
    return nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))


@contract(compat.hook_of, "accelerate.hooks.add_hook_to_module", "torch.nn.Module._hf_hook")
def test_a_dispatched_module_has_a_hook_and_a_plain_one_none():
    model = small_model()

    assert compat.hook_of(model[0]) is None
    dispatch_model(model, {"0": "cpu", "1": "cpu"}, main_device="cpu", force_hooks=True)
    assert isinstance(compat.hook_of(model[0]), ModelHook)


@contract(compat.offloads, "accelerate.hooks.AlignDevicesHook.offload", "accelerate.hooks.SequentialHook.hooks")
def test_hooks_that_keep_weights_elsewhere_are_told():
    model = cpu_offload(small_model(), execution_device="cpu")
    hook = compat.hook_of(model[0])

    assert compat.offloads(hook)
    assert compat.offloads(SequentialHook(ModelHook(), hook))
    assert not compat.offloads(ModelHook()) and not compat.offloads(None)


class Doubling(ModelHook):
    """Doubles what a module returns."""

    def post_forward(self, module, output):
        return 2 * output


@contract(compat.attach_hook, "accelerate.hooks.add_hook_to_module")
def test_an_attached_hook_is_run():
    linear, x = nn.Linear(4, 4), torch.ones(1, 4)
    expected = 2 * linear(x)

    hooked = compat.attach_hook(linear, Doubling())

    assert torch.equal(hooked(x), expected)
    assert isinstance(compat.hook_of(hooked), Doubling)


@contract(compat.detach_hook, "accelerate.hooks.remove_hook_from_module")
def test_a_module_without_its_hook_is_as_before():
    linear, x = nn.Linear(4, 4), torch.ones(1, 4)
    expected = linear(x)

    plain = compat.detach_hook(compat.attach_hook(linear, Doubling()))

    assert torch.equal(plain(x), expected)
    assert compat.hook_of(plain) is None


@contract(compat.balanced_memory, "accelerate.utils.get_balanced_memory")
def test_limits_of_the_cpu_alone_stay_as_they_are():
    limits = {"cpu": 1000}

    assert compat.balanced_memory(small_model(), limits, [], low_zero=False) == {"cpu": 1000}
    assert limits == {"cpu": 1000}
