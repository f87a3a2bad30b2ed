"""What a card says, and how one that somebody touched is told."""

import pytest

from optimum_qvlm.report.card import CardFacts, is_ours, read_metadata, render_card, seal
from optimum_qvlm.report.figures import fidelity_figures
from optimum_qvlm.report.precision import PartRow
from optimum_qvlm.spec import ActivationSpec, WeightSpec

ROW = PartRow(
    part="model.layers",
    weight=WeightSpec(bits=4, group=128),
    activation=ActivationSpec(bits=8),
    linears=28,
    weights=786_432,
    bytes=418_240,
    error=0.0116,
)
CALIBRATION = {
    "method": "qvlm",
    "base_model": "org/base",
    "base_revision": "c0ffee",
    "source": "packaged",
    "samples": 64,
    "seed": 0,
    "fingerprint": "abc123",
    "versions": {"optimum_qvlm": "0.1.0", "torch": "2.13"},
}
VALUES = {
    "scheme": "w4a8",
    "vision_scheme": None,
    "format_version": 1,
    "calibration": CALIBRATION,
    "modules": {"a": {}},
    "manifest": {"a.weight_packed": ["I32", [10]], "norm.weight": ["F32", [25]]},
}


def facts(**changes) -> CardFacts:
    return CardFacts(**({"values": VALUES, "rows": [ROW]} | changes))


def test_the_import_comes_before_everything_else():
    text = render_card(facts(repo="me/model"))

    assert text.index("import optimum_qvlm") < text.index("from transformers import AutoModelForImageTextToText")
    assert 'AutoProcessor.from_pretrained("me/model")' in text


def test_metadata_is_what_the_hub_reads():
    inherited = {"license": "llama2", "language": ["en"], "tags": ["theirs"], "base_model": "wrong"}

    found = read_metadata(render_card(facts(inherited=inherited, tags=("mine", "qvlm"))))

    assert found == {
        "license": "llama2",
        "language": ["en"],
        "base_model": "org/base",
        "base_model_relation": "quantized",
        "library_name": "transformers",
        "pipeline_tag": "image-text-to-text",
        "tags": ["qvlm", "optimum-qvlm", "quantized", "w4a8", "4-bit", "mine"],
    }


def test_parts_and_calibration_are_said():
    text = render_card(facts(files={"model.safetensors": 1_000_000}))

    assert "| `model.layers` | 28 | w4a8 | 128 | token | 786,432 | 418.24 kB | 1.16e-02 |" in text
    assert "| everything else | | as in the source | | | | 100 bytes | |" in text
    assert "Size: 1.00 MB of weights in 1 file." in text
    assert "- source: org/base at commit c0ffee" in text
    assert "- data: packaged, 64 samples, seed 0" in text
    assert "`abc123`" in text
    assert "optimum_qvlm 0.1.0, torch 2.13" in text
    assert "vision tower and projector kept in full precision" in text
    assert "differ from the source" not in text


def test_norms_that_took_up_equalizers_are_said():
    """Everything else is as in the source, but they are not."""
    report = facts().report | {"folded_into_norms": {"model.layers.0.self_attn.q_proj": "model.layers.0.norm"}}

    assert "differ from the source, since they scale what the linears behind them read: 1." in render_card(
        facts(report=report)
    )


def test_a_text_model_has_a_tokenizer_and_no_tower():
    text = render_card(facts(sees_images=False))

    assert "AutoModelForCausalLM" in text
    assert "AutoProcessor" not in text
    assert "vision" not in text
    assert read_metadata(text)["pipeline_tag"] == "text-generation"


def test_a_local_source_is_not_named():
    """The path of a folder is nobody's business."""
    calibration = {name: value for name, value in CALIBRATION.items() if not name.startswith("base_")}

    text = render_card(facts(values=VALUES | {"calibration": calibration}))

    assert "base_model" not in read_metadata(text)
    assert "# Quantized model, w4a8" in text


@pytest.mark.parametrize(
    "report, shown",
    [
        (
            {"fidelity": {"tokens": 100, "mean_kl": 0.01234, "top1_agreement": 0.987}},
            ["| held-out samples | 100 | 0.0123 | 98.7 % |"],
        ),
        (
            {"fidelity": {"prefill": {"tokens": 9, "mean_kl": 0.5, "top1_agreement": 1.0}, "decode": {"mean_kl": 1.0}}},
            ["| prefill | 9 | 0.5000 | 100.0 % |", "| decode |  | 1.0000 |  |"],
        ),
        ({}, []),
        ({"fidelity": "good"}, []),
        ({"fidelity": {"note": 5}}, []),
    ],
    ids=["one", "named", "none", "text", "other"],
)
def test_fidelity_is_shown_where_it_is_known(report, shown):
    text = render_card(facts(report=report))

    assert ("## Fidelity" in text) == bool(shown)
    assert all(line in text for line in shown)
    assert len(fidelity_figures(report)) == len(shown)


def test_both_paths_and_greedy_answers_are_said():
    report = {
        "fidelity": {
            "prefill": {"tokens": 90, "mean_kl": 0.5, "top1_agreement": 0.9},
            "decode": {"tokens": 80, "mean_kl": 0.25, "top1_agreement": 1.0},
            "generate": {"answers": 8, "tokens": 14.25, "agreed_tokens": 9.5, "exact_match": 0.375},
        }
    }

    text = render_card(facts(report=report))

    assert "| prefill | 90 | 0.5000 | 90.0 % |\n| decode | 80 | 0.2500 | 100.0 % |" in text
    assert "Prefill: answers read at once. Decode: read one token at a time" in text
    assert "Greedy answers: 37.5 % of 8 are those of full precision throughout" in text
    assert "the first difference comes after 9.5 of 14.2 tokens on average." in text


def test_equal_answers_have_no_first_difference():
    generate = {"answers": 8, "tokens": 14.25, "agreed_tokens": 14.25, "exact_match": 1.0}

    text = render_card(facts(report={"fidelity": {"generate": generate}}))

    assert (
        "Greedy answers: 100.0 % of 8 are those of full precision throughout; they have 14.2 tokens on average." in text
    )


def test_a_report_of_one_path_explains_no_other():
    """Earlier releases measured one."""
    text = render_card(facts(report={"fidelity": {"tokens": 100, "mean_kl": 0.01, "top1_agreement": 0.9}}))

    assert "Decode" not in text and "Greedy" not in text


def test_kept_linears_are_named_and_many_counted():
    text = render_card(facts(report={"kept_in_full_precision": [f"m{number}" for number in range(11)]}))

    assert "`m7` and 3 more." in text
    assert "`m8`" not in text


def test_a_card_knows_itself():
    text = render_card(facts())

    assert is_ours(text)
    assert is_ours(text.replace("\n", "\r\n")), "git on Windows changes line ends"


@pytest.mark.parametrize(
    "change",
    [
        lambda text: text.replace("w4a8", "w4a4", 1),
        lambda text: text + "more\n",
        lambda text: "Read this first.\n" + text,
        lambda text: text.rsplit("<!--", 1)[0],
        lambda _: "# Mine\n",
        lambda _: "",
    ],
    ids=["edited", "appended", "prepended", "without seal", "another", "empty"],
)
def test_a_touched_card_is_its_authors(change):
    assert not is_ours(change(render_card(facts())))


def test_a_seal_fits_one_text_only():
    assert is_ours(seal("a\n"))
    assert not is_ours(seal("a\n").replace("a\n", "b\n", 1))


@pytest.mark.parametrize(
    "text, found",
    [
        ("---\nlicense: mit\n---\n# x", {"license": "mit"}),
        ("---\r\nlicense: mit\r\n---\r\n", {"license": "mit"}),
        ("# no block", {}),
        ("---\n[1, 2]\n---\n", {}),
        ("---\na: [\n---\n", {}),
        ("---\n!!python/object/apply:os.system ['true']\n---\n", {}),
    ],
    ids=["block", "windows", "none", "list", "broken", "code"],
)
def test_metadata_of_other_cards_is_read_or_left_out(text, found):
    assert read_metadata(text) == found
