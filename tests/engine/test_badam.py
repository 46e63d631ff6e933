"""BAdam: who trains when, what rests, and that nothing else changes."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from torch import nn

import subspan.optim as optim


class Layered(nn.Module):
    """An embedding, three layers with norms and biases, a final norm and a head."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed_tokens = nn.Embedding(11, 6)
        self.layers = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(6), nn.Linear(6, 6), nn.Tanh()) for _ in range(3)
        )
        self.norm = nn.LayerNorm(6)
        self.lm_head = nn.Linear(6, 11)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embed_tokens(tokens)
        for layer in self.layers:
            x = x + layer(x)
        return self.lm_head(self.norm(x))

    def awake(self) -> set[str]:
        """First two parts of the names of all parameters that require a gradient."""
        names = (name for name, p in self.named_parameters() if p.requires_grad)
        return {".".join(name.split(".")[: 2 if "layers" in name else 1]) for name in names}


def take(model: Layered, optimizer: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        optimizer.zero_grad()
        tokens = torch.randint(0, 11, (4, 5), generator=torch.Generator().manual_seed(step))
        nn.functional.cross_entropy(model(tokens).flatten(0, 1), tokens.flatten()).backward()
        optimizer.step()


def built(**options: object) -> tuple[Layered, optim.SubspaceOptimizer]:
    model = Layered()
    settings = {"lr": 1e-2, "switch_block_every": 3, **options}
    return model, optim.for_model(model, "badam", **settings)  # type: ignore[arg-type]


def test_blocks_take_turns_from_construction_on_and_others_rest():
    for mode, order in (("descending", (2, 1, 0)), ("ascending", (0, 1, 2))):
        model, optimizer = built(switch_mode=mode)
        start = {name: p.detach().clone() for name, p in model.named_parameters()}
        for turn, layer in enumerate(order * 2):
            assert model.awake() == {f"layers.{layer}"}
            take(model, optimizer, range(3 * turn, 3 * turn + 2))
            held = {name for name, p in model.named_parameters() if p.grad is not None}
            assert held and all(name.startswith(f"layers.{layer}.") for name in held)
            assert model.awake() == {f"layers.{layer}"}
            take(model, optimizer, range(3 * turn + 2, 3 * turn + 3))
            # Weight, bias and norm of one layer: 6 x 6 + 3 x 6 entries, two moments.
            assert optimizer.state_bytes()["total"] == 2 * 4 * 54
        for name, p in model.named_parameters():
            assert torch.equal(start[name], p) != name.startswith("layers.")


def test_random_order_is_a_fresh_permutation_in_every_round_and_of_every_seed():
    orders = []
    for seed in range(6):
        model, optimizer = built(switch_mode="random", switch_block_every=1, seed=seed)
        turns = []
        for step in range(6):
            turns.append(next(iter(model.awake())))
            take(model, optimizer, range(step, step + 1))
        assert set(turns[:3]) == set(turns[3:]) == {"layers.0", "layers.1", "layers.2"}
        orders.append(tuple(turns))
    assert len(set(orders)) > 3


def test_first_block_may_be_one_step_short():
    model, optimizer = built(first_short=True)
    take(model, optimizer, range(2))
    assert model.awake() == {"layers.1"}
    take(model, optimizer, range(2, 5))
    assert model.awake() == {"layers.0"}


def test_what_is_in_no_block_can_be_trained_by_adamw_throughout():
    model, optimizer = built(others="adamw", weight_decay=0.1)
    assert model.awake() == {"layers.2", "embed_tokens", "norm", "lm_head"}
    others = {n: p for n, p in model.named_parameters() if not n.startswith("layers.")}
    twins = {name: nn.Parameter(p.detach().clone()) for name, p in others.items()}
    adamw = torch.optim.AdamW(twins.values(), lr=1e-2, weight_decay=0.1)
    for step in range(7):
        take(model, optimizer, range(step, step + 1))
        for name, p in others.items():
            twins[name].grad = p.grad.clone()
        adamw.step()
    for name, p in others.items():
        torch.testing.assert_close(p, twins[name])


def test_one_block_of_everything_is_adamw_that_restarts():
    model, optimizer = built(blocks=(("",),), switch_block_every=4, weight_decay=0.1)
    twin = copy.deepcopy(model)
    assert len(model.awake()) == 6
    for start in (0, 4, 8):
        take(model, optimizer, range(start, start + 4))
        adamw = torch.optim.AdamW(twin.parameters(), lr=1e-2, weight_decay=0.1)
        take(twin, adamw, range(start, start + 4))
    for a, b in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(a, b)


def test_excluded_parameters_are_trained_by_adamw_in_every_step():
    model = Layered()
    optimizer = optim.for_model(model, "badam", exclude=["lm_head", r"^norm\."], lr=1e-2)
    assert model.awake() == {"layers.2", "lm_head", "norm"}
    assert [group["project"] for group in optimizer.param_groups] == [True, False]


@pytest.mark.parametrize("stop", [2, 3, 4, 7])
def test_resumed_run_freezes_and_trains_the_same(stop):
    whole, optimizer = built(switch_mode="random")
    take(whole, optimizer, range(12))
    begun, optimizer = built(switch_mode="random")
    take(begun, optimizer, range(stop))
    file = io.BytesIO()
    torch.save((begun.state_dict(), optimizer.state_dict()), file)
    file.seek(0)
    weights, state = torch.load(file, weights_only=True)
    resumed, other = built(switch_mode="random")
    resumed.load_state_dict(weights)
    other.load_state_dict(state)
    assert resumed.awake() == begun.awake()
    take(resumed, other, range(stop, 12))
    pairs = zip(whole.parameters(), resumed.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


def test_copies_of_model_and_optimizer_go_on_with_their_turns():
    pair = built()
    take(*pair, range(2))
    for model, optimizer in (copy.deepcopy(pair), pickle.loads(pickle.dumps(pair))):
        take(model, optimizer, range(2, 3))
        assert model.awake() == {"layers.1"}
        take(model, optimizer, range(3, 6))
        assert model.awake() == {"layers.0"}
        take(model, optimizer, range(6, 9))
        assert model.awake() == {"layers.2"}


def test_the_users_own_frozen_parameters_stay_frozen():
    model = Layered()
    model.layers[1].requires_grad_(False)
    model.lm_head.requires_grad_(False)
    named = list(model.named_parameters())  # for_model would leave them out
    optimizer = optim.BAdam(named, lr=1e-2, switch_block_every=2)
    before = model.layers[1][1].weight.detach().clone()
    seen = []
    for step in range(8):
        seen += model.awake()
        take(model, optimizer, range(step, step + 1))
    assert set(seen) == {"layers.0", "layers.2"}
    assert torch.equal(before, model.layers[1][1].weight)


@pytest.mark.parametrize("method", ["badam", "adamw", "galore"])
def test_another_optimizer_of_the_same_model_finds_it_trainable(method):
    model, _ = built()
    optimizer = optim.for_model(model, method, lr=1e-2)
    given = sum(len(group["params"]) for group in optimizer.param_groups)
    assert given == len(list(model.parameters()))
    if method != "badam":
        assert all(p.requires_grad for p in model.parameters())


def test_update_in_the_backward_pass_takes_the_same_turns():
    plain, attached = built(), built()
    attached[1].attach_to_backward()
    for run in (plain, attached):
        take(*run, range(8))
    for a, b in zip(plain[0].parameters(), attached[0].parameters(), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"switch_block_every": 0}, "switch_block_every"),
        ({"switch_mode": "fixed"}, "switch_mode"),
        ({"others": "sgd"}, "others"),
        ({"blocks": (("layer9",),)}, "layer9"),
    ],
    ids=str,
)
def test_impossible_values_are_refused(bad, message):
    with pytest.raises(ValueError, match=message):
        built(**bad)


def test_large_embedding_updated_in_the_backward_pass_takes_its_turn(monkeypatch):
    import subspan.optim.rowwise as rowwise

    monkeypatch.setattr(rowwise, "BLOCK", 16)
    blocks = (("embed", r"^norm"), ("layers", "head"))
    plain, attached = (built(blocks=blocks, switch_mode="ascending") for _ in range(2))
    attached[1].attach_to_backward(attached[0])
    for run in (plain, attached):
        take(*run, range(8))
    for a, b in zip(plain[0].parameters(), attached[0].parameters(), strict=True):
        torch.testing.assert_close(a, b)
