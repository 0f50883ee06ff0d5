"""SAT's three phases for pretrained encoders of transformers.

    model = load_model("bert-base-uncased", "text", classes=2)
    sat = SparseAttention(model, example_inputs, block=16, density=0.25)
    optimiser = torch.optim.AdamW([*model.parameters(), *sat.parameters()], lr=5e-5)
    for inputs, labels in batches:
        loss = F.cross_entropy(model(**inputs).logits, labels)
        (loss + sat.loss()).backward()
        optimiser.step(), optimiser.zero_grad()
        sat.step()                          # True in the step that switches to block-sparse attention

Any encoder that uses the attention interface of transformers 5 will do: BERT, ViT and most others. Lengths needn't be
multiples of the block, and padding keys weigh nothing, as under "eager".
"""

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ..attention import get_attention
from ..attention.layout import BlockLayout
from ..attention.ops import attention_statistics
from ..attention.patterns import generate_layout
from ..attention.reference import PRUNED_RULES
from ..attention.statistics import AttentionStatistics
from ..common.errors import require
from ..model.sparsity import LOSS_WEIGHT, SparsityParameter, freeze, model_sparsity_loss
from ..training.transition import LayerTest, TransitionRule
from .encoders import evaluating

PATTERNS = ("learned", "pooled")
NAME = "sat"  # among the attention implementations of transformers


class SparseAttention(nn.Module):
    """Puts SAT into an encoder: dense with statistics, then block-sparse under one layout per layer.

    Its parameters, and all that its state_dict holds, are the W^P of all layers; the layouts of a fine-tuning that is
    to go on later have to be kept beside it (see `layouts`, `enter_sparse_phase`). Statistics are taken in training
    mode only; in evaluation the attention is that of the present phase.

    Args:
        model: any encoder of transformers >= 5 with the attention interface. It is changed in place (see `detach`).
        inputs: an example batch, by keyword as for the model: it is run once, to find the layers and their length.
            Later batches must have the same length.
        block: entries per block side. On a GPU 16, 32, 64 or 128.
        density: kept / all blocks in the sparse phase.
        theta, delta: of the transition test, see `TransitionRule`.
        switch_at: switch at the end of that step (from 0), whatever the test says; None leaves it to the test.
        pruned: "zero" (released) or "drop", see `reference.sparse_softmax`.
        pattern: "learned" takes the blocks with the largest R~ (the paper); "pooled" those that hold most attention in
            the mean map of the step that switches.
        sparsity_init: of W^P, see `sparsity.SparsityParameter`.

    Raises:
        InputError: a setting out of range, a model that doesn't use the attention interface or isn't an encoder, or
            inputs longer than its positions.
    """

    def __init__(
        self,
        model: nn.Module,
        inputs: Mapping[str, Tensor],
        *,
        block: int = 16,
        density: float = 0.25,
        theta: float = 1.7,
        delta: float = 1.3,
        switch_at: int | None = None,
        pruned: str = "zero",
        pattern: str = "learned",
        sparsity_init: str = "released",
    ):
        super().__init__()
        require(pruned in PRUNED_RULES, f"pruned: wanted one of {PRUNED_RULES}; got {pruned!r}")
        require(pattern in PATTERNS, f"pattern: wanted one of {PATTERNS}; got {pattern!r}")
        self.block, self.density, self.pruned, self.pattern = block, density, pruned, pattern
        self.switch_at, self.rule = switch_at, TransitionRule(theta, delta)
        self.steps = 0
        self.transition_step: int | None = None
        self.layouts: list[BlockLayout] | None = None
        self.tests: list[LayerTest] = []
        self.sparsity: nn.ModuleList | None = None
        self._attend = get_attention("sat", pruned=pruned)
        self._seen: dict[int, AttentionStatistics] = {}
        self._model = (model,)  # in a tuple its parameters don't become ours
        self._places: dict[nn.Module, int] = {}  # attention module -> layer, in the order in which they are called
        self._before = _attach(self, model, inputs)
        try:
            with torch.no_grad(), evaluating(model):
                model(**inputs)  # the layers' places are then known, and their sizes
            name = type(model).__name__
            require(
                self._places,
                f"model: {name} doesn't call the attention interface of transformers. Wanted an encoder that does, "
                "such as BERT or ViT (see https://huggingface.co/docs/transformers/attention_interface)",
            )
            require(1 <= block <= self.length, f"block: wanted 1 to the length of {self.length} positions; got {block}")
            blocks = -(-self.length // block)
            generate_layout(torch.zeros(blocks, blocks), density, block)  # refuses a density that keeps no block
            self.sparsity = nn.ModuleList(
                SparsityParameter(blocks, self.width, sparsity_init, self.length).to(model.device) for _ in self._places
            )
        except BaseException:
            self.detach()
            raise

    @property
    def phase(self) -> str:
        """ "dense" or "sparse"."""
        return "dense" if self.layouts is None else "sparse"

    def attend(
        self, module: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float | None
    ) -> Tensor:
        """One layer's attention: q, k, v (B, H, L, d), mask (B, L) bool or None -> (B, H, L, d)."""
        if scale is not None and not math.isclose(scale * math.sqrt(q.shape[3]), 1):
            q = q * (scale * math.sqrt(q.shape[3]))
        if self.sparsity is None:  # the example batch
            require(
                module not in self._places,
                f"model: wanted an attention module for each layer; several layers share one {type(module).__name__}, "
                "and would have to share W^P and layout",
            )
            self._places[module] = len(self._places)
            _, self.heads, self.length, self.width = q.shape
            return self._attend(q, k, v, key_padding_mask=mask)
        require(
            q.shape[2] == self.length,
            f"inputs: wanted the {self.length} positions of the example batch; got {q.shape[2]}. Pad to that length",
        )
        layer = self._places[module]
        if self.layouts is not None:
            return self._attend(q, k, v, key_padding_mask=mask, layout=self.layouts[layer])
        if module.training:
            self._seen[layer] = attention_statistics(q, k, self.block, key_padding_mask=mask)
        return self._attend(q, k, v, key_padding_mask=mask)

    def loss(self) -> Tensor:
        """What to add to the task loss: 0.01 x layers x the sparsity losses of the last training forward (released
        weight); 0 in the sparse phase. Its gradient reaches W^P alone.

        Raises:
            InputError: in the dense phase without a forward in training mode since the last step.
        """
        if self.layouts is not None:
            return torch.zeros((), device=self.sparsity[0].weight.device)
        pooled = [layer.pooled for layer in self._statistics()]
        return LOSS_WEIGHT * len(pooled) * model_sparsity_loss(self.sparsity, pooled)

    def _statistics(self) -> list[AttentionStatistics]:
        require(
            len(self._seen) == len(self.sparsity),
            "the dense phase wants a forward of the model in training mode before loss() and step(): model.train()",
        )
        return [self._seen[layer] for layer in range(len(self.sparsity))]

    def step(self) -> bool:
        """The transition test, after each optimiser step; whether this step switched. Does nothing once sparse.

        The tests of the last step, one per layer, are in `tests`. After a switch the optimiser should be a fresh one,
        as in the paper (at half the rate): W^P is frozen.
        """
        if self.layouts is not None:
            return False
        seen = self._statistics()
        passed, self.tests = self.rule.update([layer.mean_map for layer in seen])
        switch = passed if self.switch_at is None else self.steps >= self.switch_at
        if switch:
            learned = self.pattern == "learned"
            scores = [parameter() for parameter in self.sparsity] if learned else [layer.pooled for layer in seen]
            self.enter_sparse_phase([generate_layout(score, self.density, self.block) for score in scores])
        self._seen.clear()
        self.steps += 1
        return switch

    def enter_sparse_phase(self, layouts: list[BlockLayout]) -> None:
        """Set one layout per layer and freeze W^P.

        Raises:
            InputError: they don't fit the layers or their length.
        """
        self.layouts = freeze(self.sparsity, layouts, self.heads, self.length)
        self.transition_step = self.steps
        self.rule = TransitionRule(self.rule.theta, self.rule.delta)  # done; its maps needn't be kept

    def detach(self) -> None:
        """Give the model its former attention back."""
        (model,) = self._model
        model.set_attn_implementation(self._before)
        for module in model.modules():
            module.__dict__.pop(OWNER, None)


# ---- the attention interface of transformers -------------------------------------------------------------------------

OWNER = "sat_lib_owner"  # where a module keeps its SparseAttention: in its __dict__, so that it isn't a submodule
HARMLESS = ("output_attentions", "output_hidden_states", "return_dict", "use_cache", "num_items_in_batch")


def _attach(sat: SparseAttention, model: nn.Module, inputs: Mapping[str, Tensor]) -> str:
    """Let the model call `sat` for its attention; returns the implementation that it had."""
    name = type(model).__name__
    require(
        hasattr(model, "set_attn_implementation"),
        f"model: wanted an encoder of transformers >= 5; got {name}, which has no attention interface. For other "
        "models call sat_lib's attention yourself: `get_attention('sat')`",
    )
    require(
        not any(OWNER in module.__dict__ for module in model.modules()),
        f"model: this {name} has SAT already; detach() that one first",
    )
    positions, tokens = getattr(model.config, "max_position_embeddings", None) or 0, inputs.get("input_ids")
    length = 0 if tokens is None else tokens.shape[-1]
    require(
        positions <= 0 or length <= positions,
        f"input_ids: the model has {positions} positions; got {length} tokens. Cut them off: "
        f"tokenizer(..., truncation=True, max_length={positions})",
    )
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(NAME, _attention)
    AttentionMaskInterface.register(NAME, _padding_mask)  # without it the mask arrives as None, and padding counts
    before = model.config._attn_implementation
    model.set_attn_implementation(NAME)
    for module in model.modules():
        module.__dict__[OWNER] = sat
    return before


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **more,
) -> tuple[Tensor, None]:
    """What the models call. Returns (B, L, H, d) and no attention map, which the sparse phase hasn't got."""
    sat, name = module.__dict__.get(OWNER), type(module).__name__
    require(sat is not None, f"model: {name} is set to {NAME!r} without a SparseAttention. Make one for this model")
    require(
        dropout == 0,
        f"dropout: SAT's attention has none; {name} wants {dropout}. Load the model with `load_model`, or with "
        "attention_probs_dropout_prob=0.0 (in some models attention_dropout=0.0)",
    )
    require(
        attention_mask is None or (attention_mask.dim() == 2 and attention_mask.shape[1] == key.shape[2]),
        f"attention_mask: wanted (B, L), 1 for real tokens and 0 for padding; got "
        f"{None if attention_mask is None else tuple(attention_mask.shape)}",
    )
    require(
        query.shape == key.shape,
        f"model: wanted self-attention, as many keys as queries and heads; got queries "
        f"{tuple(query.shape)} and keys {tuple(key.shape)} in {name}",
    )
    unknown = sorted(one for one in more.keys() - HARMLESS if more[one] is not None and more[one] is not False)
    require(not unknown, f"model: {name} wants attention with {', '.join(unknown)}, which SAT's can't do")
    out = sat.attend(module, query, key, value, attention_mask, scaling)
    return out.transpose(1, 2).contiguous(), None


def _padding_mask(mask_function, attention_mask: Tensor | None = None, **_) -> Tensor | None:
    """The mask that `_attention` is given: (B, L) bool, True for real tokens; None where there is no padding."""
    from transformers.masking_utils import bidirectional_mask_function

    require(
        mask_function is bidirectional_mask_function,
        "model: wanted an encoder in which every token sees every other; this one is causal or windowed",
    )
    return None if attention_mask is None else attention_mask.bool()
