"""What a dry run prints."""

import json
from dataclasses import replace

import pytest

from optimum_qvlm.pipeline.cost import Cost
from optimum_qvlm.plan import Block, ModuleRecord
from optimum_qvlm.report.dry_run import DryRun, ModuleRow, module_rows
from optimum_qvlm.report.precision import readable_bytes, scheme_of
from optimum_qvlm.spec import ActivationSpec, WeightSpec
from tests.plans import plan_for
from tests.tiny_models import tiny_llava


def record(site, **changes):
    values = {
        "in_features": 64,
        "out_features": 64,
        "bias": False,
        "weight_bits": 4,
        "weight_group": 64,
        "symmetric": True,
        "scale_dtype": "float32",
        "activation_bits": 8,
        "activation_group": None,
        "activation_clip": 1.0,
        "weight_clip": 1.0,
        "site": site,
    }
    return ModuleRecord.from_dict(values | changes)


def row(name="a.q_proj", **changes):
    values = {
        "name": name,
        "part": "language",
        "block": 1,
        "weight": WeightSpec(bits=4, group=64),
        "activation": ActivationSpec(bits=8),
        "site": name,
        "bytes_before": 4_000,
        "bytes_after": 600,
    }
    return ModuleRow(**(values | changes))


def dry_run_of(*rows, **changes):
    values = {
        "modules": rows,
        "kept": ("lm_head",),
        "samples": 64,
        "missing_answers": 0,
        "chain": {"vision": 0.0, "language": 2e-7},
        "cost": Cost(seconds=71.4, answer_seconds=0.0, host_bytes=62_700_000, device_bytes=30_400_000),
        "bytes_before": 7_760_000,
        "bytes_after": 2_010_000,
        "saved_bytes": 2_170_000,
        "rehearsal_seconds": 6.3,
    }
    return DryRun(**(values | changes))


def test_rows_follow_the_plan_with_blocks_of_any_depth():
    """Blocks come from the plan, whatever their depth; layers that nothing reads come last, without one."""
    plan = plan_for(tiny_llava())
    blocks = (
        Block(part="vision", first=0, last=1),
        Block(part="projector", first=0, last=0),
        Block(part="language", first=0, last=1),
    )
    names = [linear.name for linear in plan.linears()]
    sizes = dict.fromkeys(names, 5)

    rows = module_rows(replace(plan, blocks=blocks), {n: record(n) for n in names}, sizes, sizes)

    assert [entry.name for entry in rows] == names
    assert {(entry.part, entry.block) for entry in rows} == {
        ("vision", 1),
        ("projector", 2),
        ("language", 3),
        ("unused", None),
    }
    assert rows[-1].part == "unused"


@pytest.mark.parametrize("bits, scheme", [((4, 8), "w4a8"), ((8, None), "w8a16"), ((6, 6), "w6a6")])
def test_a_scheme_is_named_by_its_bits(bits, scheme):
    assert scheme_of(record("x", weight_bits=bits[0], activation_bits=bits[1])) == scheme


def test_the_table_has_a_line_for_each_linear():
    odd = row("a.odd", weight=WeightSpec(bits=4, symmetric=False))
    shown = dry_run_of(
        row(),
        row("a.k_proj", site="a.q_proj", weight=WeightSpec(bits=4, group=64, two_level=True)),
        odd,
        row("b", block=None),
    )

    head, *lines = str(shown).splitlines()

    assert head.split() == ["block", "part", "module", "scheme", "group", "site", "before", "after"]
    assert lines[0].split() == ["1", "language", "a.q_proj", "w4a8", "64", "own", "4.00", "kB", "600", "bytes"]
    assert "64, two levels" in lines[1] and "of q_proj" in lines[1]
    assert "row, zero point" in lines[2]
    assert lines[3].startswith("- ")
    assert lines[4] == "kept     lm_head"


def test_totals_and_estimate_come_last():
    text = str(dry_run_of(row(), row("b", block=None, part="unused"), missing_answers=3))

    assert "2 linears in 1 blocks, 1 kept in full precision, 1 in layers that nothing reads" in text
    assert "model in memory: 7.76 MB -> 2.01 MB" in text
    assert "64 samples, 3 without answer" in text
    assert "differ from the model's forward by at most 2.0e-07" in text
    assert text.splitlines()[-1] == (
        "estimate: 71 s, 62.70 MB of CPU memory, 30.40 MB more on the device that computes; this dry run took 6 s"
    )


def test_without_data_nothing_is_said_of_samples():
    text = str(dry_run_of(row(), samples=0, chain={}))

    assert "samples" not in text
    assert "differ" not in text


def test_values_survive_json():
    shown = dry_run_of(row())

    values = json.loads(json.dumps(shown.to_dict(), allow_nan=False))

    assert values["modules"] == [
        {
            "name": "a.q_proj", "part": "language", "block": 1, "scheme": "w4a8", "group": 64, "symmetric": True,
            "two_level": False, "site": "a.q_proj", "bytes_before": 4_000, "bytes_after": 600,
        }
    ]  # fmt: skip
    assert values["cost"]["seconds"] == 71.4
    assert set(values) == set(DryRun.__dataclass_fields__)


@pytest.mark.parametrize(
    "count, text", [(0, "0 bytes"), (999, "999 bytes"), (1_500, "1.50 kB"), (7 * 10**9, "7.00 GB")]
)
def test_sizes_are_readable(count, text):
    assert readable_bytes(count) == text
