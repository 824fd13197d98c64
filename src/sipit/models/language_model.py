"""A causal language model as this project sees it: text ↔ tokens, tokens → states at a layer and site."""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable, Mapping, Sequence
from functools import cached_property
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn
from transformers.cache_utils import DynamicCache

from sipit.errors import InputError, ModelError, OptionError
from sipit.models.arithmetic import arithmetic_of, rounding_of
from sipit.models.embeddings import EmbeddingRows
from sipit.models.families import family_of, module_at
from sipit.models.fingerprint import fingerprint
from sipit.models.generation import GenerationCache
from sipit.models.head import LogitsHead
from sipit.models.packed_row import in_turn
from sipit.models.prepacked import drop_prepacked, prepacked
from sipit.models.quantized import rounds_activations
from sipit.models.rope import fresh, frozen, regime, switch_length
from sipit.models.sites import SITES, SiteSpec
from sipit.models.truncated import TappedModel, TruncatedModel, UpperModel
from sipit.observations import Cut, Observation, Site, dtype_named
from sipit.observations.formats.dump import ModelShape

Prompt = str | Sequence[int] | Tensor | Sequence[Mapping[str, str]]

_Made = TypeVar("_Made")

_MESSAGE = "QXJ7zv"  # stands for a user's message where only what is written before it is wanted
_PROBE_TOKENS = 12  # length of the prompt a cut is checked on
_PACKED_GAP = 0.05  # of a state's norm: above every rounding of bfloat16, below a key seen or missed


class LanguageModel:
    """A causal LM with its tokenizer, ready to be cut after any block.

    Args:
        model: a transformers causal LM in eval mode; never modified.
        tokenizer: its tokenizer, or None where only token ids are used.
        name: what to call it in records.

    Raises:
        ModelError: its layout is unknown, it is in training mode, or a cut through the layout's
            attribute names, or a packed pass through it, does not reproduce `output_hidden_states`.
    """

    def __init__(self, model: nn.Module, tokenizer: Any = None, *, name: str = "unnamed") -> None:
        if model.training:
            raise ModelError(f"model {name!r} is in training mode, so its states are random; call .eval() on it first")
        self.model = model
        self.tokenizer = tokenizer
        self.name = name
        self.family = family_of(model)
        self.trunk = self._trunk_of(model)
        self.n_layers = len(cast(nn.ModuleList, getattr(self.trunk, self.family.blocks)))
        embedding = cast(nn.Embedding, cast(Any, model).get_input_embeddings())
        self.vocab_size = int(embedding.weight.shape[0])
        self.embeddings = EmbeddingRows(embedding, self.vocab_size)
        table = getattr(self.trunk, self.family.positions or "", None)
        self.max_positions: int | None = None  # longest prompt; None where positions are computed, not looked up
        if table is not None:
            self.max_positions = int(table.weight.shape[0]) - int(getattr(table, "offset", 0))
        self._making = threading.RLock()
        self._derived: dict[Hashable, Any] = {}
        self._probe_ids = torch.arange(_PROBE_TOKENS) * 7919 % self.vocab_size
        self._probe_states = self._reference_states()
        self._returns_tuple = self._blocks_return_tuples()
        self.d_model = int(self._probe_states[0].shape[-1])
        for layer in {0, 1, self.n_layers // 2, self.n_layers - 1}:
            self.cut(Cut(layer), seq_len=_PROBE_TOKENS)
        self.cut(Cut(self.n_layers, "final"), seq_len=_PROBE_TOKENS)
        self._check_upper()
        if not rounds_activations(model):  # such a model is captured and refused only where it would be packed
            self._check_packing(self.cut(Cut(max(1, self.n_layers // 2)), seq_len=_PROBE_TOKENS))

    def derived(self, key: Hashable, make: Callable[[], _Made]) -> _Made:
        """Return what was made of this model under a key, making it once, whichever thread asks first.

        It lives as long as the model. `make` may ask for other keys.
        """
        with self._making:
            if key not in self._derived:
                self._derived[key] = make()
            return cast(_Made, self._derived[key])

    @property
    def device(self) -> torch.device:
        """Where the weights live."""
        return next(self.model.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the weights, and of the states the model computes."""
        return next(self.trunk.parameters()).dtype

    @cached_property
    def arithmetic(self) -> str:
        """Name of what it computes in: its dtype, or "autocast-" and another."""
        return arithmetic_of(self.trunk)

    @property
    def sites(self) -> tuple[Site, ...]:
        """Sites this version can capture and invert."""
        return tuple(SITES)

    def width(self, cut: Cut) -> int:
        """Width of what leaks at a cut: d_model at most sites, the vocabulary's size for logits."""
        if SITES[cut.site].ends == "block":
            return self.d_model
        return self.derived(("width", cut), lambda: int(self.cut(cut).ordinary(self._probe_ids[:1]).shape[-1]))

    @property
    def d_head(self) -> int | None:
        """Width of one key of an attention head; None where the configuration does not tell."""
        config = cast(Any, self.model).config.get_text_config()
        n_heads = getattr(config, "num_attention_heads", None)
        return getattr(config, "head_dim", None) or (self.d_model // n_heads if n_heads else None)

    @property
    def shape(self) -> ModelShape:
        """What of this model decides how dumped values are laid out."""
        head = cast(Any, self.model).get_output_embeddings()
        n_logits = self.vocab_size if head is None else int(head.weight.shape[0])
        return ModelShape(n_layers=self.n_layers, d_head=self.d_head, vocab_size=n_logits)

    @torch.no_grad()
    def head(self, states: Tensor) -> Tensor:
        """Return the model's own logits for states after the final norm. (…, T, D) → (…, T, W)."""
        logits: Tensor = self._head(states)
        return logits

    @cached_property
    def _head(self) -> LogitsHead:
        return LogitsHead(self.model, self.family.trunk)

    def ignores_mean(self, spec: SiteSpec) -> bool:
        """Whether a constant added to every coordinate of a token's row is gone at a site."""
        return not spec.sees_mean and (spec.ends == "block" or self._norm_ignores_mean)

    @cached_property
    def _norm_ignores_mean(self) -> bool:
        """Whether it is gone after the final norm, as behind a LayerNorm."""
        with torch.no_grad():
            before = self.cut(Cut(self.n_layers)).ordinary(self._probe_ids)  # (T, D)
            shifted = before + before.abs().amax(dim=1, keepdim=True)
            return bool((self._normed(shifted) - self._normed(before)).norm() <= 0.05 * self._normed(before).norm())

    def _normed(self, states: Tensor) -> Tensor:
        """Run the modules behind the last block on its states. (T, D) → (T, D')."""
        for name in self.family.final:
            module = getattr(self.trunk, name)
            states = states if module is None else module(states)
        return states

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 over the config and every weight as loaded."""
        return fingerprint(self.model)

    def encode(self, text: str, *, chat: bool = False) -> Tensor:
        """Return the token ids of `text` as the tokenizer makes them, BOS included where it adds one. (T,).

        Args:
            text: any string; nothing is trimmed or normalised beyond what the tokenizer itself does.
            chat: wrap it as one user message in the tokenizer's chat template, reply begun.

        Raises:
            ModelError: there is no tokenizer, or no chat template.
            InputError: the text gives no tokens.
        """
        if chat:
            return self.encode_chat([{"role": "user", "content": text}])
        ids = self._require_tokenizer()(text)["input_ids"]
        return self._checked_ids(torch.tensor(ids, dtype=torch.long))

    def encode_chat(self, messages: Sequence[Mapping[str, str]]) -> Tensor:
        """Return the token ids of a conversation under the tokenizer's chat template. (T,)."""
        tokenizer = self._require_tokenizer()
        if not getattr(tokenizer, "chat_template", None):
            raise ModelError(f"the tokenizer of {self.name!r} has no chat template; pass plain text")
        text = tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=True)
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]  # the template writes its own
        return self._checked_ids(torch.tensor(ids, dtype=torch.long))

    def encode_template_prefix(self, system: str | None = None) -> Tensor:
        """Return the token ids that the chat template writes before a user's message. (P,).

        Args:
            system: a system prompt to stand before it; None: the template's own, if it has one.

        Raises:
            ModelError: there is no tokenizer, no chat template, or one that changes the message.
        """
        tokenizer = self._require_tokenizer()
        if not getattr(tokenizer, "chat_template", None):
            raise ModelError(f"the tokenizer of {self.name!r} has no chat template; pass the prefix as text or ids")
        messages = [] if system is None else [{"role": "system", "content": system}]
        messages.append({"role": "user", "content": _MESSAGE})
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        before, found, _ = text.partition(_MESSAGE)
        if not found:
            raise ModelError(f"the chat template of {self.name!r} changes the message; pass the prefix as text or ids")
        return self._checked_ids(torch.tensor(tokenizer(before, add_special_tokens=False)["input_ids"]).long())

    def decode(self, input_ids: Sequence[int] | Tensor) -> str | None:
        """Return the text of some tokens, special ones kept, nothing cleaned up; None without a tokenizer."""
        if self.tokenizer is None:
            return None
        ids = [int(i) for i in input_ids]
        text: str = self.tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        return text

    def capture(
        self,
        text: Prompt | None = None,
        *,
        input_ids: Sequence[int] | Tensor | None = None,
        layer: int | None = None,
        site: Site = "block",
        dtype: str | torch.dtype | None = None,
        chat: bool = False,
    ) -> Observation:
        """Return the states of one prompt after `layer` blocks, by one ordinary forward pass.

        Args:
            text: a string, a list of chat messages, or token ids.
            input_ids: token ids, instead of `text`. (T,)
            layer: number of blocks run, 0 .. n_layers; may be left out where one layer alone has the site.
            site: what leaks; see docs/sites.md.
            dtype: dtype to store the states in; default: the model's own.
            chat: wrap a string in the tokenizer's chat template.

        Raises:
            OptionError: layer or site out of range, or both or neither of text and input_ids.
            InputError: an empty prompt, or an id outside the vocabulary.
        """
        if (text is None) == (input_ids is None):
            raise OptionError("capture needs one prompt: pass either text or input_ids")
        ids = self._prompt_ids(cast(Prompt, text if input_ids is None else input_ids), chat)
        layer = self.checked_layer(layer, site)
        states = self.cut(Cut(layer, site), seq_len=len(ids)).ordinary(ids)  # (T, D)
        stored = states if dtype is None else states.to(dtype_named(dtype))
        return Observation(states=stored, layer=layer, site=site, model=self.name, fingerprint=self.fingerprint)

    def checked_layer(self, layer: int | None, site: Site) -> int:
        """Return the layer that `layer` and `site` mean.

        Raises:
            OptionError: the layer is out of range, or the model lacks the site.
        """
        if site not in SITES:
            raise OptionError(f"site {site!r} is unknown; choose one of {', '.join(SITES)}")
        spec = SITES[site]
        lowest, highest = spec.first_layer(self.n_layers), spec.last_layer(self.n_layers)
        if layer is None and lowest == highest:
            return lowest
        if layer is None:
            raise OptionError(f"site {site!r} needs a layer: pass {lowest} to {highest}")
        if isinstance(layer, bool) or not isinstance(layer, int):
            raise OptionError(f"layer {layer!r} is not a whole number; pass {lowest} to {highest}")
        if spec.is_behind_all and layer != lowest:
            raise OptionError(
                f"site {site!r} lies after all blocks, so its layer is {lowest}, not {layer}; "
                "leave the layer out, or pass site 'block'"
            )
        if not lowest <= layer <= highest:
            ends = f", and site {site!r} {lowest} to {highest}" if highest < self.n_layers else ""
            raise OptionError(
                f"layer {layer} is out of range; model {self.name!r} has layers 0 to {self.n_layers}{ends}"
            )
        return layer

    def regime(self, seq_len: int | None) -> int:
        """Return a key of the passes that compute as one of `seq_len` tokens does; one for all in most models.

        Rotary embeddings of the types "dynamic" and "longrope" are other ones in passes beyond a length.
        """
        return regime(cast(Any, self.trunk).config, seq_len)

    def cut(self, cut: Cut, *, seq_len: int | None = None) -> TruncatedModel:
        """Return the model cut there, checked once against `output_hidden_states`.

        Args:
            cut: where.
            seq_len: of the pass whose states are wanted: every pass through the cut computes as that one
                does, whatever its own length; None: as a short one.
        """
        is_probed = self.regime(seq_len) == self.regime(_PROBE_TOKENS)

        def made() -> TruncatedModel:
            if not is_probed:
                self.cut(cut, seq_len=_PROBE_TOKENS)  # checks it
            spec = SITES[cut.site]
            head = self._head if spec.ends == "logits" else None
            model = TruncatedModel(self._trunk_at(seq_len), self.family, layer=cut.layer, spec=spec, head=head)
            if is_probed:
                self._check_cut(model)
            return model

        return self.derived(("cut", cut, self.regime(seq_len)), made)

    @property
    def final_cut(self) -> Cut:
        """The cut after the final norm."""
        return Cut(self.n_layers, "final")

    def _trunk_at(self, seq_len: int | None) -> nn.Module:
        """Return the trunk as it computes in a pass of so many tokens; the caller's own where that is all one."""
        if switch_length(cast(Any, self.trunk).config) is None:
            return self.trunk
        key = self.regime(seq_len)
        return self.derived(("trunk", key), lambda: frozen(self.trunk, key))

    @torch.no_grad()
    def final_states(self, seen: Tensor, layer: int, site: Site) -> tuple[Tensor, int]:
        """Return the states after the final norm that observed states lead to, and the blocks that took.

        (T, D) → (T, D), number of blocks run on each of the T tokens. The blocks above `layer` see
        only what was observed, so the next-token probabilities that follow need no recovered token.
        """
        seen = seen.to(self.device, self.dtype)
        if site == "final":
            return seen, 0
        if layer == 0:  # an embedding is not a state of the running text; there is no entry block
            raise OptionError("layer 0 has no block to enter after; recover the prefix first")
        trunk = self._trunk_at(len(seen))
        upper = self.derived(
            ("upper", layer, self.regime(len(seen))),
            lambda: UpperModel(trunk, self.family, layer=layer, returns_tuple=self._returns_tuple),
        )
        return upper.final_states(seen), upper.n_blocks

    @torch.no_grad()
    def next_token_logits(self, final_states: Tensor) -> Tensor:
        """Return the language-model head's logits, in float32. (N, D) → (N, vocab_size)."""
        logits: Tensor = self._fast_head(final_states).float()
        cap = getattr(self.trunk.config, "final_logit_softcapping", None)
        if cap:
            logits = torch.tanh(logits / cap) * cap
        missing = self.vocab_size - logits.shape[1]  # a head may have fewer rows than the embedding, or more
        return nn.functional.pad(logits, (0, missing), value=-1e9) if missing else logits

    def generation_cache(self, length: int) -> GenerationCache:
        """Return an empty cache for `tapped(…).states`, with room for `length` tokens a row."""
        return GenerationCache(self.n_layers, length)

    @cached_property
    def _fast_head(self) -> Any:
        return prepacked(cast(Any, self.model).get_output_embeddings())

    def drop_prepacked(self) -> None:
        """Give back the copies of the weights that are laid out for fast products, until they are needed again."""
        drop_prepacked(self.model)

    def tapped(self, cuts: Sequence[Cut], *, seq_len: int | None = None) -> TappedModel:
        """Return the model stopped after the last of several cuts, giving the states at all of them.

        They are of the sites "block" and "final"; `seq_len` is as in `cut`.
        """
        for cut in cuts:
            self.cut(cut, seq_len=seq_len)  # checks it
        return TappedModel(
            self._trunk_at(seq_len), self.family, [(cut.layer, SITES[cut.site].is_behind_all) for cut in cuts]
        )

    def _trunk_of(self, model: nn.Module) -> nn.Module:
        """Return the module that owns the blocks, of a model that has a head as well."""
        head = getattr(model, "get_output_embeddings", None)
        try:
            if head is None or head() is None:
                raise AttributeError
            return module_at(model, self.family.trunk)
        except (AttributeError, NotImplementedError) as error:
            raise ModelError(
                f"model {self.name!r} ({type(model).__name__}) has no language-model head; "
                "load it with AutoModelForCausalLM, or by sipit.load"
            ) from error

    def _prompt_ids(self, prompt: Prompt, chat: bool) -> Tensor:
        if isinstance(prompt, str):
            return self.encode(prompt, chat=chat)
        if isinstance(prompt, Tensor):
            return self._checked_ids(prompt)
        items = list(prompt)
        if items and isinstance(items[0], Mapping):
            return self.encode_chat(cast(list[Mapping[str, str]], items))
        try:
            ids = torch.tensor(items)
        except (TypeError, ValueError, RuntimeError, OverflowError) as error:
            raise InputError(f"token ids must be a row of whole numbers ({error})") from error
        return self._checked_ids(ids if items else ids.long())

    def _checked_ids(self, ids: Tensor) -> Tensor:
        if ids.ndim == 2 and ids.shape[0] == 1:
            ids = ids[0]
        if ids.ndim != 1 or ids.is_floating_point():
            raise InputError(f"token ids must be a row of whole numbers, got shape {tuple(ids.shape)}")
        if ids.numel() == 0:
            raise InputError("the prompt is empty: it gives no tokens; pass at least one character")
        outside = ((ids < 0) | (ids >= self.vocab_size)).nonzero()
        if outside.numel():
            where = int(outside[0, 0])
            raise InputError(
                f"token id {int(ids[where])} at position {where} is outside the vocabulary of "
                f"{self.name!r} (0 to {self.vocab_size - 1})"
            )
        if self.max_positions is not None and len(ids) > self.max_positions:
            raise InputError(
                f"the prompt has {len(ids)} tokens, model {self.name!r} has positions for {self.max_positions}; "
                "pass a shorter one"
            )
        return ids.long()

    def _require_tokenizer(self) -> Any:
        if self.tokenizer is None:
            raise ModelError(f"model {self.name!r} has no tokenizer; pass input_ids instead of text")
        return self.tokenizer

    @torch.no_grad()
    def _reference_states(self) -> tuple[Tensor, ...]:
        """Return what the model itself calls its hidden states, on the probe prompt: n_layers + 1 of (T, D)."""
        try:
            output = cast(Any, fresh(self.model))(
                input_ids=self._probe_ids.to(self.device)[None],
                output_hidden_states=True,
                use_cache=False,
            )
        except (TypeError, RuntimeError, ValueError, AttributeError, LookupError) as error:
            raise ModelError(
                f"model {self.name!r} cannot run its own forward pass in {self.dtype} on {self.device} "
                f"({str(error).strip()[:200]}); load it in another dtype or on another device"
            ) from error
        states = tuple(h[0] for h in output.hidden_states)
        if len(states) != self.n_layers + 1:
            raise self._refusal(
                f"returns {len(states)} hidden states for {self.n_layers} blocks, expected {self.n_layers + 1}"
            )
        return states

    def _blocks_return_tuples(self) -> bool:
        """Return whether a block of this family returns its states in a tuple."""
        try:
            tapped = TappedModel(self._trunk_at(_PROBE_TOKENS), self.family, [(1, False)])
            tapped.states(self._probe_ids[None])
        except (TypeError, RuntimeError, ValueError, AttributeError, IndexError) as error:
            raise self._refusal(f"cannot be cut after one block ({error})") from error
        return tapped.returns_tuple

    def _refusal(self, what: str) -> ModelError:
        kind = cast(Any, self.model).config.model_type
        return ModelError(f"model {self.name!r} {what}; this layout of {kind!r} is not supported")

    @torch.no_grad()
    def _check_cut(self, cut: TruncatedModel) -> None:
        """Refuse a cut that does not reproduce what the model itself gives out."""
        try:
            got = cut.ordinary(self._probe_ids)  # (T, W)
            if cut.layer == self.n_layers and cut.spec.ends == "block":  # not given out: run the final modules on it
                got, expected = self._normed(got), self._probe_states[-1]
                if not cut.spec.is_plain:
                    return  # read from the plain cut, which is checked
            else:
                expected = cut.spec.read(*self._given_out(cut))
        except (TypeError, RuntimeError, ValueError, AttributeError, LookupError) as error:
            raise self._refusal(f"cannot be cut after {cut.layer} blocks ({error})") from error
        unit = rounding_of(self.trunk) * float(expected.float().abs().max())
        gap = float((got.float() - expected.float()).abs().max()) if got.shape == expected.shape else float("inf")
        if not gap <= 64 * unit:  # the same kernels on the same shapes: a few roundings at most
            raise self._refusal(f"cut after {cut.layer} blocks differs from its output_hidden_states by {gap:.2g}")

    def _given_out(self, cut: TruncatedModel) -> tuple[Tensor, ...]:
        """Return what the model itself gives out on the probe prompt where a cut's pass ends. (T, …) each."""
        if cut.spec.ends in ("block", "final"):
            return (self._probe_states[cut.layer],)
        output = cast(Any, fresh(self.model))(
            input_ids=self._probe_ids.to(self.device)[None],
            past_key_values=DynamicCache(),  # of no config: one that slides would drop rows
            use_cache=True,
        )
        if cut.spec.ends == "logits":
            return (output.logits[0],)
        layer = output.past_key_values.layers[cut.layer]
        return tuple(heads[0].transpose(0, 1).flatten(1) for heads in (layer.keys, layer.values))

    def _check_upper(self) -> None:
        """Refuse a model whose last block cannot run without those below it: it reads their keys, say."""
        if self.n_layers < 2:
            return
        try:
            self.final_states(self._probe_states[self.n_layers - 1], self.n_layers - 1, "block")
        except (TypeError, RuntimeError, ValueError, AttributeError, LookupError) as error:
            raise self._refusal(f"cannot run its last block on states alone ({error})") from error
        finally:
            self.drop_prepacked()

    def _check_packing(self, cut: TruncatedModel) -> None:
        """Refuse a model whose packed pass, with wrong tokens between the right ones, gives other states."""
        row = cut.row()
        got = []
        try:
            for places in torch.arange(_PROBE_TOKENS).chunk(2):  # the first half becomes the prefix of the second
                right = self._probe_ids[places]
                tokens = torch.stack([right, (right + 1) % self.vocab_size], dim=1).flatten()  # (2 Q,)
                attends = torch.eye(len(tokens), dtype=torch.bool)
                attends[:, ::2] |= in_turn(len(tokens)).tril(-1)[:, ::2]
                got.append(row.run(tokens, places.repeat_interleave(2), attends)[::2])
                row.keep(range(0, len(tokens), 2))
        except OptionError:
            return  # it refuses packed passes by itself, in its own words
        except (TypeError, RuntimeError, ValueError, AttributeError, LookupError, AssertionError) as error:
            raise self._refusal(f"cannot run a packed pass ({error})") from error
        finally:
            self.drop_prepacked()
        expected = self._probe_states[cut.layer].cpu().double()
        if cut.layer == self.n_layers:
            expected = cut.ordinary(self._probe_ids).cpu().double()
        norms = expected.norm(dim=1)
        gaps = (torch.cat(got).cpu().double() - expected).norm(dim=1) / norms.clamp(min=1e-30)  # (T,)
        gaps = gaps[gaps.isfinite()]  # a model made to overflow is none of this check's business
        gap = float(gaps.median()) if len(gaps) else 0.0  # a rounding may send a few tokens to other experts
        if not gap <= _PACKED_GAP:
            raise self._refusal(f"gives other states in a packed pass: {gap:.2g} of their norm away")
