"""Laws of a model and a guide."""

from __future__ import annotations

import copy
import math
from typing import Any

import torch
from pyro.infer import Trace_ELBO
from torch import nn

from pyro_vae.parameters import own_parameters
from pyro_vae.testing.parts import seeded
from pyro_vae.traces import Program, draw, log_joint, log_q, particles, plate_nesting, simulate


class PairLaws:
    """A model and a guide: any Pyro programs whose arguments are the batch.

    Attributes:
        rescores: Whether the guide scores samples that it did not draw.
    """

    rescores = True

    def make(self) -> tuple[Program, Program, tuple[Any, ...]]:
        """A new pair, and the arguments of both (a small batch)."""
        raise NotImplementedError(f"{type(self).__name__} must say how to make its pair: def make(self): return ...")

    def test_every_density_is_per_sample_and_datum(self) -> None:
        with seeded():
            model, guide, args = self.make()
            table = particles(model, guide, *args, num_samples=4)
            shape = (4, len(args[0]))
            assert table.log_likelihood.shape == shape and table.log_weight.shape == shape
            assert torch.isfinite(table.log_weight).all() and set(table.log_prior) == set(table.log_q)

    def test_samples_are_scored_again_alike(self) -> None:
        with seeded(), torch.no_grad():
            model, guide, args = self.make()
            table = particles(model, guide, *args, num_samples=3)
            again = log_joint(model, table.latents, *args)
            assert torch.allclose(again, table.log_joint, rtol=1e-4, atol=1e-3)
            latents = {name: value.clone() for name, value in table.latents.items()}
            if not self.rescores:
                try:
                    log_q(guide, latents, *args)
                except ValueError:
                    return
                raise AssertionError("declared unable to score a foreign sample, but did")
            again = log_q(guide, latents, *args)
            own = torch.stack(list(table.log_q.values())).sum(0)
            assert torch.allclose(again, own, rtol=1e-4, atol=1e-3)

    def test_the_elbo_is_pyros(self) -> None:
        with seeded():
            model, guide, args = self.make()
            with own_parameters(model, guide):
                nesting = plate_nesting(model, guide, *args)
                with seeded(1), torch.no_grad():
                    theirs = -Trace_ELBO(max_plate_nesting=nesting).loss(model, guide, *args)
                with seeded(1), torch.no_grad():
                    table = draw(model, guide, args, {}, 1)
            ours = table.scale * table.log_weight.sum()
            assert math.isclose(float(ours), theirs, rel_tol=1e-5, abs_tol=1e-4)

    def test_a_draw_from_the_model_has_the_shape_of_the_data(self) -> None:
        with seeded():
            model, _, args = self.make()
            drawn = simulate(model, *args).observations
            assert any(value.shape == args[0].shape for value in drawn.values())

    def test_two_copies_learn_apart(self) -> None:
        with seeded():
            model, guide, args = self.make()
            if not (isinstance(model, nn.Module) and isinstance(guide, nn.Module)):
                return
            model2, guide2 = copy.deepcopy((model, guide))
            before = [p.detach().clone() for m in (model, guide) for p in m.parameters()]
            with own_parameters(model2, guide2):
                parameters = {id(p): p for m in (model2, guide2) for p in m.parameters() if p.requires_grad}
                optimizer = torch.optim.SGD(list(parameters.values()), 0.1)
                Trace_ELBO().loss_and_grads(model2, guide2, *args)
                optimizer.step()
            for programs, moves in (((model, guide), False), ((model2, guide2), True)):
                after = [p for program in programs for p in program.parameters()]
                assert any(not torch.equal(a, b) for a, b in zip(before, after, strict=True)) is moves
