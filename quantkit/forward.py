"""The forward pass, one decoder block at a time: transformers' own layers, built empty and filled from any `Model`.

The whole network is built on the meta device, where it costs nothing. To learn what each block is called with (masks,
rotary embeddings), the network's own `forward` runs once with its blocks replaced by ones that only take notes; so no
line here knows how a family embeds tokens or masks attention. Calibration and scoring both walk over the blocks, all
sequences through one block before the next: memory is bounded by a block and the hidden states, not by the model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from copy import deepcopy
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from quantkit.attention import attention_for
from quantkit.codecs.sharing import PARTS, Share, all_at_once, in_two
from quantkit.errors import BadInput, UsageError
from quantkit.hardware import may_have_card, multiplies_bf16
from quantkit.later import Device, Tensor, nn, no_grad, on_cpu, torch
from quantkit.model import Model, Ref, refused, transformers_config
from quantkit.stats import Stats

EMBEDDING = "model.embed_tokens.weight"  # by its HF name
BATCH_TOKENS = 2048  # tokens through a block at once: enough for full matmul speed, little beside a block's weights


def device_of(name: str) -> torch.device:
    """`auto`, `cpu`, `cuda` or `cuda:i` -> a device that is there; UsageError otherwise.

    The one way in to a CUDA device, so this says how float32 is multiplied there: whole. TF32 keeps 10 bits of each
    factor, too few for what solvers invert; where fewer will do, factors are bf16 and say so (`gram.py`).
    """
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    if name == "auto":
        return _card(torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    if name == "cpu":
        return torch.device("cpu")
    kind, _, index = name.partition(":")
    if kind != "cuda" or (index and not index.isdigit()):
        raise UsageError(f"unknown device {name!r}", where="--device", hint="known: auto, cpu, cuda, cuda:0, ...")
    if not torch.cuda.is_available() or int(index or 0) >= torch.cuda.device_count():
        raise UsageError(f"this machine has no {name}", where="--device", hint="use --device cpu")
    return _card(int(index) if index else torch.cuda.current_device())


def _card(index: int) -> torch.device:
    """A card by its number, which is the current one from now on: streams and graphs are made on that."""
    torch.cuda.set_device(index)
    return torch.device("cuda", index)


def limit_device(device: torch.device, nbytes: int) -> None:
    """The most that this process may allocate on a CUDA device; torch.OutOfMemoryError beyond it."""
    total = torch.cuda.get_device_properties(device).total_memory
    torch.cuda.set_per_process_memory_fraction(min(1.0, nbytes / total), device)


def place_of(name: str) -> Device:
    """The same, and torch is asked only where there may be a card: what needs no torch then goes without."""
    return "cpu" if name == "cpu" or (name == "auto" and not may_have_card()) else device_of(name)


@dataclass(frozen=True)
class Network:
    """A model's empty transformers network, the device its blocks are filled on, and the type they are run in."""

    model: Model
    empty: nn.Module
    device: torch.device
    dtype: torch.dtype = field(default_factory=lambda: torch.float32)
    batch_tokens: int = BATCH_TOKENS
    mixed: bool = False  # whether blocks are calibrated with products of bf16

    def calibrating(self) -> AbstractContextManager[Any]:
        """How a block is run in a calibration: products of bf16 numbers, added up in float32, where a device has them.

        The residual stream and all sums stay float32. What bf16 takes off an activation, some 0.1% of it at random, is
        little beside what quantized layers before it have done to it.
        """
        return torch.autocast(self.device.type, torch.bfloat16) if self.mixed else nullcontext()

    def statistics(self, width: int) -> Stats:
        """Those of an activation of so many columns, of which nothing was seen yet."""
        return Stats.zeros(width, self.device, self.mixed)

    @property
    def base(self) -> Any:
        """The part under the language-model head."""
        return self.empty.model

    def filled(self, module: nn.Module, weights: Mapping[str, Tensor]) -> nn.Module:
        """`module` with `weights` on the device; every parameter must be among them."""
        module.load_state_dict(
            {name: w.to(self.device, self.dtype) for name, w in weights.items()}, strict=True, assign=True
        )
        return module.eval()

    def set_buffers(self, module: nn.Module) -> None:
        """Put what no file holds on the device, as transformers sets it: the scale of Gemma's embedding."""
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, torch.empty_like(buffer, device=self.device))
        initialized: Any = self.empty
        initialized._init_weights(module)

    @contextmanager
    def block(self, layer: int, weights: Mapping[str, Tensor] | None = None) -> Iterator[nn.Module]:
        """Block `layer` with its weights (read from the model unless given), emptied again at the end."""
        if weights is None:
            weights = {name: ref.read() for name, ref in self.model.block(layer).items()}
        module = self.base.layers[layer]
        try:
            yield self.filled(module, self.model.arch.parameters(weights))
        finally:
            module.to("meta")

    def outer(self, name: str) -> Tensor:
        """A tensor outside the blocks, by its HF name, on the device."""
        return self.model.tensors[name].read().to(self.device, self.dtype)

    def head(self) -> Tensor:
        """The output matrix (vocab, hidden): the embedding itself where the two are tied."""
        tied = self.model.config.get("tie_word_embeddings")
        return self.outer(EMBEDDING if tied else "lm_head.weight")


def network(
    model: Model, device: torch.device, dtype: torch.dtype | None = None, batch_tokens: int = BATCH_TOKENS
) -> Network:
    """The empty network of `model`, from transformers, checked to have exactly the model's tensors."""
    from transformers import AutoModelForCausalLM

    dtype = dtype or torch.float32  # not a default value, for which torch would have to be there
    config = transformers_config(model.config, model.path)
    # the fused kernels know no soft cap on attention and would leave it out
    soft = getattr(config, "attn_logit_softcapping", None)
    config._attn_implementation = "eager" if soft else attention_for(device)
    config._experts_implementation = "eager"
    try:
        with torch.device("meta"):
            empty = AutoModelForCausalLM.from_config(config, dtype=dtype)
    except Exception as e:  # such as a kind of rotary embedding that it does not have
        raise refused(e, model.path) from e
    wanted = {n: tuple(p.shape) for n, p in empty.named_parameters()}
    have = {n: tuple(p.shape) for n, p in _parameters(model, lambda ref: torch.empty(ref.shape, device="meta")).items()}
    if odd := sorted(set(wanted.items()) ^ set(have.items())):
        raise BadInput(f"transformers builds another model from this configuration ({odd[0][0]})", where=model.path)
    return Network(model, empty, device, dtype, batch_tokens)


def for_calibration(net: Network) -> Network:
    """The same network, calibrated as fast as its device allows; scores are always of float32."""
    return replace(net, mixed=multiplies_bf16(net.device))


def _parameters(model: Model, read: Callable[[Ref], Tensor]) -> dict[str, Tensor]:
    """Every parameter of transformers' network, by its name there."""
    out = {name: read(ref) for name, ref in model.outer().items()}
    for layer in range(model.layers):
        block = model.arch.parameters({name: read(ref) for name, ref in model.block(layer).items()})
        out |= {f"model.layers.{layer}.{name}": p for name, p in block.items()}
    return out


def _taking_notes() -> Any:
    """Stands in for a block: passes hidden states on and keeps what it was called with, as `kwargs`."""

    class Notes(nn.Module):
        kwargs: Mapping[str, Any] = {}

        def forward(self, hidden: Tensor, **kwargs: Any) -> Tensor:
            self.kwargs = kwargs
            return hidden

    return Notes()


@dataclass(frozen=True)
class States:
    """Hidden states of all sequences (n, T, hidden) in CPU memory, and what each block is called with beside them."""

    hidden: Tensor
    kwargs: tuple[Mapping[str, Any], ...]
    batch_tokens: int = BATCH_TOKENS

    def batches(self) -> Iterator[slice]:
        """Slices of sequences that hold about `batch_tokens` tokens."""
        step = max(1, self.batch_tokens // self.hidden.shape[1])
        for start in range(0, len(self.hidden), step):
            yield slice(start, start + step)


@no_grad
def embed(net: Network, ids: Tensor, embedding: Tensor | None = None) -> States:
    """Token ids (n, T) -> the hidden states before the first block, of the model's embedding or of one in its place.

    Of the embedding, the tokens that there are are read and no others, which are few of a large vocabulary. Masks and
    rotary embeddings are taken from a call with one sequence: all have the same length and no padding.
    """
    base = net.base
    blocks, norm, rotary, tokens = base.layers, base.norm, base.rotary_emb, base.embed_tokens
    notes = [_taking_notes() for _ in blocks]
    used, ids = ids.unique(return_inverse=True)
    if (rows := net.model.tensors[EMBEDDING].shape[0]) <= (most := int(used[-1])):
        what = f"token {most} of the tokenizer has no row in an embedding of {rows}"
        raise BadInput(what, where=net.model.path, hint="this tokenizer is another model's, or tokens were added to it")
    weight = net.model.tensors[EMBEDDING].some(used) if embedding is None else embedding[used.to(embedding.device)]
    try:
        base.layers, base.norm = nn.ModuleList(notes), nn.Identity()
        base.rotary_emb = type(rotary)(config=base.config).to(net.device)
        base.embed_tokens = deepcopy(tokens)  # empty as it is
        net.set_buffers(base.embed_tokens)
        base.embed_tokens.padding_idx = None  # may lie beyond these rows
        base.embed_tokens.weight = nn.Parameter(weight.to(net.device, net.dtype))
        step = max(1, net.batch_tokens // ids.shape[1])
        hidden = torch.cat(
            [base(input_ids=part.to(net.device), use_cache=False).last_hidden_state.cpu() for part in ids.split(step)]
        )
        base(input_ids=ids[:1].to(net.device), use_cache=False)
        return States(hidden, tuple(n.kwargs for n in notes), net.batch_tokens)
    finally:
        base.layers, base.norm, base.rotary_emb, base.embed_tokens = blocks, norm, rotary, tokens


@no_grad
def run(states: States, layer: int, block: nn.Module, device: torch.device, batches: slice = slice(None)) -> None:
    """All sequences, or some batches of them, through one block, in place."""
    for part in list(states.batches())[batches]:
        out = block(states.hidden[part].to(device), **states.kwargs[layer])
        states.hidden[part] = (out[0] if isinstance(out, tuple) else out).to(states.hidden.device)


def shared_out(states: States, device: Device) -> tuple[States, Share]:
    """Batches for two threads of a CPU, as large as one would be for both, and the way to share them out.

    The steps of a batch are short: two cores that share each of them wait for one another.
    """
    count, length = states.hidden.shape[:2]
    tokens = min(states.batch_tokens // PARTS, -(-count // PARTS) * length)
    if not on_cpu(device) or count < PARTS or length > tokens:
        return states, all_at_once
    return replace(states, batch_tokens=tokens), in_two()


@no_grad
def final_states(net: Network, ids: Tensor, positions: slice) -> Iterator[int | Tensor]:
    """The normed hidden states at `positions` of every sequence, (n, p, hidden) on the CPU.

    Yields the number of each block as it is done, then the states: the caller can show progress.
    """
    states, share = shared_out(embed(net, ids), net.device)
    count = len(list(states.batches()))
    for layer in range(net.model.layers):
        with net.block(layer) as block:
            share(partial(run, states, layer, block, net.device), count)
        yield layer
    norm = net.filled(net.base.norm, {"weight": net.outer("model.norm.weight")})
    out = torch.empty_like(states.hidden[:, positions])
    for part in states.batches():
        out[part] = norm(states.hidden[part, positions].to(net.device)).cpu()
    net.base.norm.to("meta")
    yield out


def last(steps: Iterable[Any]) -> Any:
    """The last thing a stream yields."""
    value = None
    for value in steps:  # noqa: B007
        pass
    return value


@no_grad
def generate(net: Network, start: Tensor, length: int, seed: int, temperature: float = 1.0) -> Tensor:
    """Sample sequences (n, length) that continue `start` (n, s), with the whole model on the device, seeded."""
    from transformers import GenerationConfig

    causal_lm: Any = whole(net)
    torch.manual_seed(seed)
    how = GenerationConfig(
        do_sample=True, temperature=temperature, top_k=0, min_new_tokens=length - start.shape[1], max_length=length
    )
    start = start.to(net.device)
    out = causal_lm.generate(start, generation_config=how, attention_mask=torch.ones_like(start)).cpu()
    net.empty.to("meta")
    return out


def whole(net: Network) -> nn.Module:
    """The network with all its weights on the device."""
    net.set_buffers(net.base.embed_tokens)
    weights = _parameters(net.model, lambda ref: ref.read().to(net.device, net.dtype))
    net.filled(net.empty, weights | _tied(net))
    net.base.rotary_emb = type(net.base.rotary_emb)(config=net.base.config).to(net.device)
    return net.empty


def _tied(net: Network) -> dict[str, Tensor]:
    return {} if "lm_head.weight" in net.model.tensors else {"lm_head.weight": net.head()}
