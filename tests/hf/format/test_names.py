"""Names on disk against names at run time."""

import pytest
from torch import nn

from optimum_qvlm.hf.format.names import disk_names_of_linears, runtime_modules
from optimum_qvlm.hf.format.safetensors_files import read_headers
from tests.jobs import load
from tests.tiny_models import tiny_llama

LLAVA = {
    "language_model.lm_head": "lm_head",
    "language_model.model.layers.1.mlp.down_proj": "model.language_model.layers.1.mlp.down_proj",
    "multi_modal_projector.linear_1": "model.multi_modal_projector.linear_1",
}


@pytest.fixture
def llava(llava_folder):
    return load(llava_folder)


@pytest.fixture
def llava_tensors(llava_folder):
    """Tensor names of the checkpoint."""
    return read_headers(llava_folder.glob("*.safetensors"))


def linears(model):
    return {path for path, module in model.named_modules() if isinstance(module, nn.Linear)}


def test_names_of_llava_differ_on_disk(llava, llava_tensors):
    """transformers keeps the names of old checkpoints; ours must be the same as those of the original."""
    names = disk_names_of_linears(llava, llava_tensors)

    assert {disk: path for path, disk in names.items() if disk in LLAVA} == LLAVA


def test_every_linear_has_a_name_that_the_checkpoint_stores(llava, llava_tensors):
    names = disk_names_of_linears(llava, llava_tensors)

    assert set(names) == linears(llava)
    assert all(f"{name}.weight" in llava_tensors for name in names.values())
    assert len(set(names.values())) == len(names)


def test_the_way_there_and_back_ends_where_it_began(llava, llava_tensors):
    names = disk_names_of_linears(llava, llava_tensors)

    assert runtime_modules(llava, names.values()) == {name: path for path, name in names.items()}


def test_names_of_llama_are_the_same(llama_folder):
    model = load(llama_folder)

    names = disk_names_of_linears(model, read_headers(llama_folder.glob("*.safetensors")))

    assert names == {path: path for path in linears(model)}


@pytest.mark.parametrize(
    "name", ["language_model.model.layers.99.mlp.up_proj", "language_model.model.norm", "nothing", ""]
)
def test_names_that_lead_to_no_linear_are_left_out(llava, name):
    assert runtime_modules(llava, [name, "language_model.lm_head"]) == {"language_model.lm_head": "lm_head"}


def test_a_tied_output_embedding_keeps_its_own_name(tmp_path):
    """It is not in the checkpoint; the input embedding that is there is no linear."""
    tiny_llama(tie_word_embeddings=True).save_pretrained(tmp_path)
    tensors = read_headers(tmp_path.glob("*.safetensors"))
    assert "lm_head.weight" not in tensors

    assert disk_names_of_linears(load(tmp_path), tensors)["lm_head"] == "lm_head"
