"""What a calibration keeps in its journal, and takes out of it again: partitions, blocks, the encoder."""

from collections.abc import Mapping
from dataclasses import asdict, replace
from typing import Any

from torch import Tensor, nn

from optimum_qvlm.modules.qlinear import PACKED_PARAMETERS, QuantLinear
from optimum_qvlm.modules.recorded import empty_linear
from optimum_qvlm.pipeline.encoder.step import EncoderLoss, EncoderResult
from optimum_qvlm.pipeline.finished import FinishedBlock, FinishedSite, plain_linear
from optimum_qvlm.pipeline.journal import Entry, Journal
from optimum_qvlm.pipeline.result import BlockError, LayerError, SiteError
from optimum_qvlm.plan import Block, Dependency, ModuleRecord, PlannedPart, QuantPlan, Site

NORM = "norm:"
"""Before the path of a tensor that a norm has once it has taken up an equalizer."""


def write_partition(journal: Journal, plan: QuantPlan) -> None:
    """Keep blocks, and what they were formed by."""
    journal.write("partition", _partition_values(plan))


def read_partition(journal: Journal, plan: QuantPlan) -> QuantPlan | None:
    """The plan with the blocks that were formed, None where there are none."""
    entry = journal.read("partition")
    if entry is None:
        return None
    try:
        return _with_partition(plan, entry.values)
    except (KeyError, TypeError, ValueError) as error:
        journal.refuse("partition", repr(error))
        return None


def write_block(journal: Journal, finished: FinishedBlock) -> None:
    """Keep a block with its packed linears."""
    values = {
        "block": asdict(finished.block),
        "sites": [_site_values(site) for site in finished.sites],
        "layers": [asdict(error) for error in finished.layers],
        "joint": None if finished.joint is None else asdict(finished.joint),
        "folded": dict(finished.folded),
    }
    tensors = _packed_tensors([site.modules for site in finished.sites])
    journal.write(_name(finished.block), values, tensors | {NORM + path: t for path, t in finished.norms.items()})


def read_block(journal: Journal, model: nn.Module, part: PlannedPart, block: Block) -> FinishedBlock | None:
    """A block that was finished, not yet in the model; None where it was not, or is not what the plan asks for."""
    entry = journal.read(_name(block))
    if entry is None:
        return None
    try:
        return _block(entry, model, part, block)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        journal.refuse(_name(block), repr(error))
        return None


def write_encoder(
    journal: Journal, learned: EncoderResult, plan: QuantPlan, modules: Mapping[str, QuantLinear]
) -> None:
    """Keep the optimised encoder, and the blocks that were formed on what it gives."""
    values = {
        "partition": _partition_values(plan),
        "losses": [asdict(loss) for loss in learned.losses],
        "chosen": learned.chosen,
        "seconds": learned.seconds,
        "mean_depths": list(learned.mean_depths),
        "records": {name: record.to_dict() for name, record in learned.records.items()},
    }
    journal.write("encoder", values, _packed_tensors([modules]))


def read_encoder(
    journal: Journal, model: nn.Module, plan: QuantPlan
) -> tuple[EncoderResult, QuantPlan, list[FinishedSite]] | None:
    """The optimised encoder, the plan with the blocks formed on it, and its sites; None where it was not finished."""
    entry = journal.read("encoder")
    if entry is None:
        return None
    try:
        values = entry.values
        records = _records(values["records"])
        sites = [site for part in plan.parts if part.vision for layer in part.layers for site in layer.sites]
        finished = [_site(entry, model, site, {x.name: records[x.name] for x in site.linears}) for site in sites]
        learned = EncoderResult(
            losses=tuple(EncoderLoss(**loss) for loss in values["losses"]),
            chosen=values["chosen"],
            seconds=values["seconds"],
            records=records,
            mean_depths=tuple(values["mean_depths"]),
        )
        return learned, _with_partition(plan, values["partition"]), finished
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        journal.refuse("encoder", repr(error))
        return None


def _name(block: Block) -> str:
    return f"block-{block.part}-{block.first}-{block.last}"


def _partition_values(plan: QuantPlan) -> dict[str, Any]:
    return {
        "blocks": [asdict(block) for block in plan.blocks],
        "dependencies": [asdict(dependency) for dependency in plan.dependencies],
        "threshold": plan.threshold,
    }


def _with_partition(plan: QuantPlan, values: Mapping[str, Any]) -> QuantPlan:
    blocks = tuple(Block(**block) for block in values["blocks"])
    places = [(block.part, n) for block in blocks for n in range(block.first, block.last + 1)]
    if places != [(part.name, n) for part in plan.parts for n in range(len(part.layers))]:
        raise ValueError("its blocks do not hold every layer once")
    return replace(
        plan,
        blocks=blocks,
        dependencies=tuple(Dependency(**dependency) for dependency in values["dependencies"]),
        threshold=values["threshold"],
    )


def _site_values(site: FinishedSite) -> dict[str, Any]:
    return {
        "records": {name: record.to_dict() for name, record in site.records.items()},
        "error": None if site.error is None else asdict(site.error),
    }


def _records(values: Mapping[str, Any]) -> dict[str, ModuleRecord]:
    return {name: ModuleRecord.from_dict(record) for name, record in values.items()}


def _packed_tensors(modules: list[Mapping[str, QuantLinear]]) -> dict[str, Tensor]:
    return {
        f"{path}.{name}": tensor
        for each in modules
        for path, module in each.items()
        for name, tensor in module.state_dict().items()
        if name in PACKED_PARAMETERS
    }


def _block(entry: Entry, model: nn.Module, part: PlannedPart, block: Block) -> FinishedBlock:
    values = entry.values
    if Block(**values["block"]) != block:
        raise ValueError(f"it holds {values['block']}")
    sites = [site for layer in part.layers[block.first : block.last + 1] for site in layer.sites]
    finished = []
    for site, held in zip(sites, values["sites"], strict=True):
        error = None if held["error"] is None else SiteError(**held["error"])
        finished.append(replace(_site(entry, model, site, _records(held["records"])), error=error))
    joint = values["joint"]
    return FinishedBlock(
        block=block,
        sites=tuple(finished),
        layers=tuple(LayerError(**error) for error in values["layers"]),
        joint=None if joint is None else BlockError(**(joint | {"block": block})),
        folded=values["folded"],
        norms={
            name.removeprefix(NORM): _fitting(name, tensor, model.get_parameter(name.removeprefix(NORM)))
            for name, tensor in entry.tensors.items()
            if name.startswith(NORM)
        },
    )


def _site(entry: Entry, model: nn.Module, site: Site, records: dict[str, ModuleRecord]) -> FinishedSite:
    """The packed linears of a site, which must be what the plan asks for."""
    modules = {}
    for linear in site.linears:
        record = records[linear.name]
        asked = (linear.in_features, linear.out_features, linear.bias, linear.weight, site.activation, site.name)
        held = (record.in_features, record.out_features, record.bias, record.weight, record.activation, record.site)
        if asked != held:
            raise ValueError(f"{linear.name} is recorded with {held}, and planned with {asked}")
        modules[linear.path] = _filled(entry, plain_linear(model, linear.path), linear.path, record)
    return FinishedSite(modules=modules, records=records)


def _filled(entry: Entry, plain: nn.Linear, path: str, record: ModuleRecord) -> QuantLinear:
    module = empty_linear(plain, record)
    for name in PACKED_PARAMETERS:
        empty = getattr(module, name)
        if empty is not None:
            key = f"{path}.{name}"
            setattr(module, name, nn.Parameter(_fitting(key, entry.tensors[key], empty), requires_grad=False))
    module.bias = plain.bias
    return module


def _fitting(name: str, tensor: Tensor, like: Tensor) -> Tensor:
    if tensor.dtype != like.dtype or tensor.shape != like.shape:
        raise ValueError(f"{name} is {tensor.dtype} {list(tensor.shape)} where {like.dtype} {list(like.shape)} belongs")
    return tensor.to(like.device)
