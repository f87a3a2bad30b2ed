"""The bundled vision-language model, asked through vLLM's OpenAI server: it answers as transformers does."""

import json
import shutil
from concurrent.futures import ThreadPoolExecutor

import pytest

from optimum_qvlm import export_compressed_tensors
from tests.servers.conftest import QUESTIONS, ServerEnded, said_by_server, said_by_transformers

SETTINGS = {
    "w4a16": {"scheme": "w4a16", "vision_scheme": "w4a16", "method": "rtn"},
    "w4a8 with transforms": {"scheme": "w4a8", "vision_scheme": "w4a8", "method": "layerwise", "transforms": "both"},
    "w8a8": {"scheme": "w8a8", "method": "rtn"},
    "exceptions": {
        "scheme": "w4a8",
        "method": "rtn",
        "overrides": {"layers.1.self_attn.k_proj": "w8a8", "layers.0.mlp.up_proj": None, "fc1": "w6a6"},
        "modules_to_not_convert": ["multi_modal_projector"],
    },
}
STOCK = {"VLLM_PLUGINS": "none"}
"""Lets vLLM load no plugin, ours included."""


def require_same_answers(client, folder, questions):
    expected = said_by_transformers(folder, questions)
    assert [said_by_server(client, question) for question in questions] == expected
    with ThreadPoolExecutor(QUESTIONS) as pool:
        assert list(pool.map(lambda question: said_by_server(client, question), questions)) == expected
    right = sum(answer == question["answer"] for answer, question in zip(expected, questions, strict=True))
    assert right >= QUESTIONS - 1, "the model is too bad for its answers to tell anything"


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS.keys())
def test_answers_alone_and_together_are_those_of_transformers(make_model, serve, questions, settings):
    _, folder = make_model(**settings)
    with serve(folder) as client:
        require_same_answers(client, folder, questions)


@pytest.mark.parametrize(("scheme", "dtype"), [("w4a16", "bfloat16"), ("w8a8", "float32")])
def test_stock_vllm_serves_an_exported_folder(make_model, serve, questions, tmp_path, scheme, dtype):
    """Its kernel for 4-bit weights on a processor takes no float32."""
    model, folder = make_model(scheme=scheme, vision_scheme=scheme, group_size=32, method="rtn", servable=True)
    export_compressed_tensors(model, tmp_path / "exported")
    with serve(tmp_path / "exported", "--dtype", dtype, **STOCK) as client:
        require_same_answers(client, folder, questions)


def test_two_processes_share_a_model(make_model, serve, questions):
    _, folder = make_model(scheme="w4a8", group_size=32, method="rtn")
    with serve(folder, "--tensor-parallel-size", 2, VLLM_CPU_OMP_THREADS_BIND="0|1") as client:
        require_same_answers(client, folder, questions)


def test_processes_that_would_share_a_group_are_refused_by_name(make_model, serve):
    """The default group is as long as the inputs."""
    _, folder = make_model(scheme="w4a16", vision_scheme=None, method="rtn")
    with pytest.raises(ServerEnded, match=r"o_proj cannot be split over 2 processes: .* 64 of its 128 .*groups of 128"):
        with serve(folder, "--tensor-parallel-size", 2, VLLM_CPU_OMP_THREADS_BIND="0|1"):
            pass


def test_a_changed_folder_is_refused(make_model, serve, tmp_path):
    _, folder = make_model(scheme="w8a8", method="rtn")
    config = json.loads((shutil.copytree(folder, tmp_path / "changed") / "config.json").read_text())
    config["quantization_config"]["symmetric"] = False
    (tmp_path / "changed" / "config.json").write_text(json.dumps(config))
    with pytest.raises(ServerEnded, match="quantization_config was changed after saving"):
        with serve(tmp_path / "changed"):
            pass
