"""Which files a save takes the place of."""

import pytest

from optimum_qvlm.hf.saving.weight_files import WeightFiles, stale_weights, weight_files_of

OTHERS = [
    "adapter_model.safetensors",
    "model.fp16.safetensors",
    "my_model.safetensors",
    "model.bin",
    "modelx.safetensors",
]


@pytest.mark.parametrize("variant, middle", [(None, ""), ("small", ".small"), ("a.b", ".a.b")])
def test_weights_of_the_same_kind_are_stale(variant, middle):
    single, index = f"model{middle}.safetensors", f"model.safetensors.index{middle}.json"
    stale = stale_weights(["config.json", single], variant)

    names = [single, index, f"model{middle}-00001-of-00002.safetensors", f"model{middle}.qvlm-0123abcd.safetensors"]
    assert all(stale.fullmatch(name) for name in names)
    assert not any(stale.fullmatch(name) for name in OTHERS)


@pytest.mark.parametrize("names", [[], ["config.json"], ["adapter_config.json", "adapter_model.safetensors"]])
def test_without_a_whole_model_nothing_is_stale(names):
    """A process that wrote a part, or an adapter, takes no model's place."""
    assert stale_weights(names, None).fullmatch("model.safetensors") is None


@pytest.mark.parametrize("variant", [None, "small"])
def test_names_of_a_generation_lead_back(variant):
    kind = WeightFiles(variant)

    for name in (f"{kind.stem}.safetensors", f"{kind.stem}-00001-of-00002.safetensors", kind.index):
        fresh = kind.in_generation(name, "0123abcd")
        assert fresh.endswith((".safetensors", ".safetensors.index.json")), "transformers refuses others"
        assert (weight_files_of(fresh), kind.usual(fresh)) == (kind, name)


@pytest.mark.parametrize("name", [None, 1, "model.safetensors", "model.x/../y.qvlm-0123abcd.safetensors"])
def test_other_names_are_of_no_generation(name):
    assert weight_files_of(name) is None
