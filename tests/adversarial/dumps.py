"""A good file of each producer that sipit reads, and seeded damage to it.

`python -m tests.adversarial.dumps 100` damages each of them so many times and prints a line for each fault; the suite
runs a few of the same. What a good answer is stands in `malformed`; a recovered text must be the first tokens of the
prompt, since a file cut between two rows may be a whole one.
"""

from __future__ import annotations

import gzip
import io
import json
import random
import shutil
import struct
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

import sipit
from sipit import LanguageModel
from tests.adversarial.damage import Damaged, damaged_bytes, damaged_header, damaged_json
from tests.adversarial.malformed import Case, Plan, malformed
from tests.adversarial.scenes import TEXT, Scene, built_scene
from tests.unit.observations.formats.arrow_files import arrow_folder
from tests.unit.observations.formats.deepspec_files import target_cache
from tests.unit.observations.formats.llama_files import memory, neighbouring_pairs, packed, session, slot

_LAYER = ("--layer", "2")
_KV = ("--layer", "1", "--site", "kv")


@dataclass(frozen=True, kw_only=True)
class Passed:
    """What one ordinary pass of the prompt leaves."""

    lm: LanguageModel
    ids: Tensor  # (T,)
    states: tuple[Tensor, ...]  # hidden_states of transformers, (1, T, D) each
    logits: Tensor  # (T, V)
    cache: tuple[tuple[Tensor, Tensor], ...]  # keys and values of each block, (1, H, T, d)


@torch.no_grad()
def passed(lm: LanguageModel) -> Passed:
    """Run the prompt through a model's own pass."""
    ids = lm.encode(TEXT)
    output: Any = lm.model(ids[None], output_hidden_states=True, use_cache=True)
    cache = tuple((layer.keys, layer.values) for layer in output.past_key_values.layers)
    return Passed(lm=lm, ids=ids, states=output.hidden_states, logits=output.logits[0], cache=cache)


def _vllm(path: Path, of: Passed) -> None:
    rows = torch.stack([of.states[1][0], of.states[2][0]], dim=1)
    save_file({"hidden_states": rows, "token_ids": of.ids}, path)


def _vllm_float8(path: Path, of: Passed) -> None:
    rows = of.states[2][0]
    scales = rows.abs().amax(dim=1, keepdim=True) / 448
    stored = (rows / scales).to(torch.float8_e4m3fn)[:, None]
    save_file({"hidden_states": stored, "hidden_states_scales": scales, "token_ids": of.ids}, path)


def _speculators(path: Path, of: Passed) -> None:
    states = [of.states[1][0], of.states[2][0]]
    torch.save({"input_ids": of.ids, "hidden_states": states, "loss_mask": torch.ones_like(of.ids)}, path)


def _spec_forge(path: Path, of: Passed) -> None:
    aux = torch.cat([of.states[0], of.states[1], of.states[2]], dim=-1)
    mask = torch.ones_like(of.ids)
    torch.save({"input_ids": of.ids, "loss_mask": mask, "hidden_state": of.states[-1], "aux_hidden_state": aux}, path)


def _eagle(path: Path, of: Passed) -> None:
    written = io.BytesIO()
    mask = torch.ones_like(of.ids)
    torch.save({"input_ids": of.ids, "hidden_state": of.states[-1][0], "loss_mask": mask}, written)
    path.write_bytes(gzip.compress(written.getvalue()))


def _steps(path: Path, of: Passed) -> None:
    steps = (slice(0, 7), slice(7, 8), slice(8, 9))  # the prompt, then two decoded tokens
    torch.save(tuple(tuple(entry[:, step].clone() for entry in of.states) for step in steps), path)


def _transformer_lens(path: Path, of: Passed) -> None:
    hooks = {f"blocks.{i}.hook_resid_pre": of.states[i] for i in range(3)}
    torch.save({**hooks, "blocks.2.hook_resid_post": of.states[2]}, path)


def _sglang(path: Path, of: Passed) -> None:
    meta = {"hidden_states": [of.states[-1][0].tolist()], "prompt_tokens": len(of.ids)}
    path.write_text(json.dumps({"text": "x", "meta_info": meta}))


def _embeddings(path: Path, of: Passed) -> None:
    rows = [[round(value, 7) for value in row] for row in of.states[-1][0].tolist()]
    path.write_text(json.dumps([{"index": 0, "embedding": rows}]))


def _prompt_logprobs(path: Path, of: Passed) -> None:
    tops = [row.log_softmax(dim=0).topk(60) for row in of.logits[:-1]]
    entries = [{str(i): {"logprob": v} for v, i in zip(*map(Tensor.tolist, top), strict=True)} for top in tops]
    path.write_text(json.dumps({"prompt_logprobs": [None, *entries], "prompt_token_ids": of.ids.tolist()}))


def _top_logits(path: Path, of: Passed) -> None:
    values, token_ids = of.logits.topk(60)
    torch.save({"values": values, "indices": token_ids}, path)


def _of_llama_cpp(of: Passed, rotation: tuple[int, int] | None = None) -> bytes:
    keys, values = ([block[n][0].transpose(0, 1).flatten(1) for block in of.cache] for n in (0, 1))
    assert of.lm.d_head is not None
    return memory([neighbouring_pairs(rows, of.lm.d_head) for rows in keys], values, rotation=rotation)


def _session(path: Path, of: Passed) -> None:
    session(path, of.ids.tolist(), _of_llama_cpp(of))


def _slot(path: Path, of: Passed) -> None:
    slot(path, packed(of.ids.tolist()), _of_llama_cpp(of, rotation=(0, 0)), version=4)


def _mlx(path: Path, of: Passed) -> None:
    tensors = {f"{i}.{n}": part.contiguous() for i, block in enumerate(of.cache) for n, part in enumerate(block)}
    save_file(tensors, path, metadata={f"2.{i}": "KVCache" for i in range(len(of.cache))})


def _sae_lens(path: Path, of: Passed) -> None:
    arrow_folder(path, of.states[2].repeat(2, 1, 1), of.ids.repeat(2, 1))


def _deep_spec(path: Path, of: Passed) -> None:
    joined = torch.stack([of.states[1][0], of.states[2][0]], dim=1)
    target_cache(path, [(of.ids.tolist(), joined, of.states[-1][0])], [0, 1], dtype=torch.bfloat16)


@dataclass(frozen=True, kw_only=True)
class Producer:
    """How a tool's file is written, and what `sipit invert` must be told of it."""

    write: Callable[[Path, Passed], None]
    told: tuple[str, ...] = ()
    suffix: str = ".pt"


PRODUCERS: dict[str, Producer] = {
    "vLLM": Producer(write=_vllm, told=("--layers", "1,2", *_LAYER), suffix=".safetensors"),
    "vLLM in float8": Producer(write=_vllm_float8, told=_LAYER, suffix=".safetensors"),
    "old speculators": Producer(write=_speculators, told=("--layers", "1,2", *_LAYER, "--site", "block")),
    "SpecForge": Producer(write=_spec_forge, told=("--site", "final"), suffix=".ckpt"),
    "SpecForge, joined layers": Producer(
        write=_spec_forge, told=("--key", "aux_hidden_state", "--layers", "0,1,2", *_LAYER), suffix=".ckpt"
    ),
    "EAGLE": Producer(write=_eagle, told=("--site", "final"), suffix=".ckpt.gz"),
    "transformers": Producer(write=lambda path, of: torch.save(of.states, path), told=_LAYER),
    "transformers, generate()": Producer(write=_steps, told=_LAYER),
    "transformers, cache": Producer(write=lambda path, of: torch.save(of.cache, path), told=_KV),
    "TransformerLens": Producer(write=_transformer_lens, told=("--key", "blocks.2.hook_resid_pre")),
    "numpy": Producer(write=lambda path, of: np.save(path, of.states[2][0].numpy()), told=_LAYER, suffix=".npy"),
    "numpy archive": Producer(
        write=lambda path, of: np.savez(path, one=of.states[2].numpy(), two=of.states[1].numpy()),
        told=("--key", "one", *_LAYER),
        suffix=".npz",
    ),
    "safetensors": Producer(
        write=lambda path, of: save_file({"x": of.states[2][0].contiguous()}, path, {"by": "me"}),
        told=_LAYER,
        suffix=".safetensors",
    ),
    "SGLang": Producer(write=_sglang, suffix=".json"),
    "llama.cpp embeddings": Producer(write=_embeddings, suffix=".json"),
    "prompt_logprobs": Producer(write=_prompt_logprobs, suffix=".json"),
    "largest logits": Producer(write=_top_logits),
    "llama.cpp session": Producer(write=_session, told=_KV, suffix=".bin"),
    "llama.cpp slot": Producer(
        write=_slot,
        told=("--layer", "1", "--site", "values"),
        suffix=".bin",
    ),
    "mlx-lm": Producer(write=_mlx, told=_KV, suffix=".safetensors"),
    "DeepSpec": Producer(write=_deep_spec, told=("--layer", "2", "--prompt", "0"), suffix=""),
    "SAELens": Producer(write=_sae_lens, told=("--prompt", "0"), suffix=""),
}


def written(producer: Producer, folder: Path, of: Passed) -> Path:
    """Write a producer's file, or folder, called "good"."""
    path = folder / f"good{producer.suffix}"
    producer.write(path, of)
    return path


def damage(rng: random.Random, good: Path, bad: Path) -> str:
    """Write a damaged copy of a file, or of a folder with one damaged file; return what was done."""
    if good.is_dir():
        shutil.copytree(good, bad)
        files = sorted(path for path in bad.iterdir() if path.stat().st_size > 2)
        file = rng.choice(files)
        if rng.randrange(6) == 0:
            file.unlink()
            return f"without {file.name}"
        what, raw = _damaged(rng, file.read_bytes(), file.suffix)
        file.write_bytes(raw)
        return f"{file.name}, {what}"
    what, raw = _damaged(rng, good.read_bytes(), good.suffix)
    bad.write_bytes(raw)
    return what


def _damaged(rng: random.Random, raw: bytes, suffix: str) -> Damaged:
    if rng.randrange(3) == 0:
        return damaged_bytes(rng, raw)
    if suffix == ".safetensors":
        return damaged_header(rng, raw)
    if suffix == ".json":
        return damaged_json(rng, raw)
    if suffix == ".gz":
        what, inner = _damaged(rng, gzip.decompress(raw), ".ckpt")
        return f"inside, {what}", gzip.compress(inner)
    if rng.randrange(3) == 0:  # a number in the head becomes another one
        bad, place = bytearray(raw), rng.randrange(min(len(raw), 400))
        odd = rng.choice((0, 1, 2**31 - 1, 2**31, 2**32 - 1))
        bad[place : place + 4] = struct.pack("<I", odd)
        return f"{odd} at byte {place}", bytes(bad)
    return damaged_bytes(rng, raw)


def plan_for(name: str) -> Callable[[random.Random, Scene], Plan]:
    """Return how a case of one producer is drawn; the scene's folder holds its good file under its name."""
    producer = PRODUCERS[name]

    def drawn(rng: random.Random, scene: Scene) -> Plan:
        good = scene.folder / "dumps" / name / f"good{producer.suffix}"
        what = damage(rng, good, Path(f"bad{producer.suffix}"))
        record = Path("record.json")

        def judge(code: int, _: str) -> str | None:
            if code != 0 or not record.is_file():
                return None  # several prompts: what each is, the record alone tells
            found = json.loads(record.read_text("utf-8"))["input_ids"]
            is_start = found == list(scene.input_ids)[: len(found)]
            return None if is_start else "recovered another prompt than the true one"

        told = ["--model", scene.model, *producer.told, "--no-fit", "--json", str(record)]
        return Plan(
            what=f"{name}, {what}",
            argv=["invert", f"bad{producer.suffix}", *told],
            named="bad",
            judge=judge,
            may_print=True,
        )

    return drawn


def scene_of_dumps(folder: Path) -> Scene:
    """Fill a folder with good files, those of each producer among them."""
    scene = built_scene(folder)
    of = passed(sipit.load(scene.model))
    for name, producer in PRODUCERS.items():
        (folder / "dumps" / name).mkdir(parents=True)
        written(producer, folder / "dumps" / name, of)
    return scene


def damaged_dump(name: str, number: int, scene: Scene) -> Case:
    """Run one case of a producer."""
    return malformed(number, scene, (plan_for(name),))


def main() -> int:
    """Run many cases from the command line: the number of them for each producer, and the first (default 0)."""
    torch.set_num_threads(1)
    n_cases = int(sys.argv[1]) if len(sys.argv) > 1 else 100
    first = int(sys.argv[2]) if len(sys.argv) > 2 else 0
    n_faults = 0
    with tempfile.TemporaryDirectory(prefix="sipit-") as folder:
        scene = scene_of_dumps(Path(folder))
        for name in PRODUCERS:
            outcomes: Counter[str] = Counter()
            for number in range(first, first + n_cases):
                case = damaged_dump(name, number, scene)
                outcomes[case.outcome] += 1
                if case.fault is not None:
                    n_faults += 1
                    print(f"FAULT {case.number}: {case.fault}; {case.what}", flush=True)
            print(f"{name}: {dict(outcomes)}", flush=True)
    print(f"{n_faults} faults")
    return 1 if n_faults else 0


if __name__ == "__main__":
    raise SystemExit(main())
