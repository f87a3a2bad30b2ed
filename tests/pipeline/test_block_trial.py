"""A block under trial: its error is what running it anew would give, whatever was tried before."""

import random

import pytest
import torch

from optimum_qvlm.pipeline.block_trial import BlockTrial, SiteCandidates, install, search_jointly
from optimum_qvlm.plan import Block
from optimum_qvlm.quant.transform import SiteTransform
from optimum_qvlm.search.site import SiteOptions, round_site
from optimum_qvlm.search.site_problem import SiteProblem
from tests.plans import front_of, plan_for
from tests.tiny_models import llama_batch, tiny_llama

BATCHES = [llama_batch(seed=0, padding=2), llama_batch(rows=3, tokens=9, seed=1), llama_batch(seed=2)]
CLIPS = (1.0, 0.7, 0.4)


class Setting:
    """A block over both layers of a tiny Llama, with three candidates per site."""

    def __init__(self):
        self.model = tiny_llama()
        self.part = plan_for(self.model, "w3a3").parts[0]
        self.chain = front_of(self.model, plan_for(self.model, "w3a3"), BATCHES)
        self.block = Block(part="language", first=0, last=1)
        self.sites = []
        full = self.chain.fork()
        with torch.no_grad():
            for number, layer in enumerate(self.part.layers):
                full.observe()
                for site in layer.sites:
                    self.sites.append(SiteCandidates(site=site, layer=number, choices=self.candidates(site)))
        self.target = full.hidden
        for entry in self.sites:
            install(self.model, entry.site, entry.choices[0])

    def candidates(self, site):
        width = site.linears[0].in_features
        problem = SiteProblem(
            inputs=torch.randn(20, width, generator=torch.Generator().manual_seed(0)),
            weights={x.name: self.model.get_submodule(x.path).weight.detach() for x in site.linears},
            specs={x.name: x.weight for x in site.linears},
            activation=site.activation,
            scale_dtype=torch.float32,
        )
        options = SiteOptions(transforms=None, feedback=None)
        return [round_site(problem, options, activation_clip=clip, transform=SiteTransform()) for clip in CLIPS]

    def trial(self, chosen=(0, 1, 2)):
        return BlockTrial(
            block=self.block,
            sites=self.sites,
            entering=self.chain.some(chosen),
            target=[self.target[number] for number in chosen],
        )

    def search(self, sites, tokens):
        return search_jointly(self.block, sites, self.chain, self.target, tokens=tokens, seed=0)


@pytest.fixture
def setting():
    return Setting()


def test_what_was_tried_before_does_not_matter(setting):
    """Layers before the first change are not run again; that must not show."""
    generator = random.Random(0)
    trial = setting.trial()
    with torch.no_grad():
        for _ in range(12):
            choice = tuple(generator.randrange(len(CLIPS)) for _ in setting.sites)
            assert trial.error(choice) == setting.trial().error(choice)


def test_layers_before_the_first_change_are_not_run_again(setting):
    trial, calls = setting.trial(), []
    for number in range(2):
        setting.model.model.layers[number].register_forward_hook(lambda *_, number=number: calls.append(number))
    start = (0,) * len(setting.sites)
    with torch.no_grad():
        trial.error(start)
        trial.error((*start[:-1], 1))
        trial.error((1, *start[1:-1], 1))

    assert calls == [0, 0, 0, 1, 1, 1, 1, 1, 1, 0, 0, 0, 1, 1, 1]


def test_only_the_chosen_runs_count(setting):
    choice = (1,) * len(setting.sites)
    with torch.no_grad():
        alone = [setting.trial([number]).error(choice) for number in range(3)]
        whole = setting.trial().error(choice)

    assert len(set(alone)) == 3
    assert min(alone) < whole < max(alone)


def test_the_search_finds_a_planted_optimum(setting):
    """Half the range clipped away is far worse than none, so nothing but 0 is right everywhere; and from a start
    that is bad on purpose, the search undoes it."""
    flipped = [
        SiteCandidates(site=entry.site, layer=entry.layer, choices=list(reversed(entry.choices)))
        for entry in setting.sites
    ]
    entering = list(setting.chain.hidden)

    choice, error = setting.search(flipped, tokens=10_000)

    assert error.after < 0.7 * error.before
    assert error.share == 1.0 and error.forwards > 1 and error.seconds > 0
    assert any(number > 0 for number in choice)
    assert all(a is b for a, b in zip(entering, setting.chain.hidden, strict=True))


def test_a_bound_on_tokens_bounds_the_runs(setting):
    """One batch of 27 tokens or of 24, of 75 in all."""
    _, error = setting.search(setting.sites, tokens=1)

    assert error.share in (24 / 75, 27 / 75)
