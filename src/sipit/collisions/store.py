"""Captured states on disk: safetensors shards and a manifest. Its specification is docs/state-folder.md.

Only shards that the manifest names count, and it is rewritten, whole, after each: an interrupted
capture leaves nothing half-counted.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from sipit.errors import InputError, MismatchError, OptionError, StorageError
from sipit.models import LanguageModel
from sipit.observations import SITES, Cut
from sipit.storage import open_tensors, read_json, whole_file, write_json

_SHARD = re.compile(r"states-[0-9]{5,}\.safetensors")

FORMAT = "sipit.states"
VERSION = 1
_KEYS = {
    "format": str,
    "version": int,
    "model": str,
    "fingerprint": str,
    "dtype": str,
    "cuts": list,
    "n_prompts": int,
    "prompts_sha256": str,
    "shard_size": int,
    "source": dict,
    "shards": list,
}


@dataclass(frozen=True, kw_only=True)
class Shard:
    """One file of a state folder."""

    file: str
    n_prompts: int
    n_bytes: int


def cut_name(cut: Cut) -> str:
    """Return the name of a (layer, site) in files: "block-15", "final-30"."""
    return f"{cut[1]}-{cut[0]}"


def cut_named(name: str) -> Cut:
    """Return the (layer, site) that such a name means."""
    site, _, layer = name.partition("-")
    if site not in SITES or not (layer.isascii() and layer.isdigit()):
        raise ValueError(f"{name!r} names no layer and site")
    return Cut(int(layer), site)


def prompts_sha256(prompts: Sequence[Tensor]) -> str:
    """Return a digest of the token ids of some prompts, in their order."""
    digest = hashlib.sha256()
    for ids in prompts:
        digest.update(len(ids).to_bytes(8, "little") + ids.long().cpu().numpy().astype("<i8").tobytes())
    return digest.hexdigest()


class StateFolder:
    """The states of many prompts' last tokens at several cuts, and the prompts.

    Raises:
        StorageError: the folder, its manifest or a shard is missing or unreadable.
        InputError: the manifest or a shard is not what it claims to be, or is cut short.
    """

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        self.manifest = read_manifest(self.path)
        self.cuts: tuple[Cut, ...] = tuple(cut_named(name) for name in self.manifest["cuts"])
        self.shards = tuple(Shard(**shard) for shard in self.manifest["shards"])
        n_captured = sum(shard.n_prompts for shard in self.shards)
        if n_captured != self.manifest["n_prompts"]:
            raise InputError(
                f"{path} holds {n_captured} of {self.manifest['n_prompts']} prompts: its capture was interrupted; "
                "run the same capture again and it goes on where it stopped"
            )
        for shard in self.shards:
            check_shard(self.path, shard)

    def __len__(self) -> int:
        return int(self.manifest["n_prompts"])

    def blocks(self, cut: Cut) -> list[Tensor]:
        """Return the states at one cut, a memory-mapped block of (n, D) a shard."""
        if cut not in self.cuts:
            raise OptionError(
                f"{self.path} holds no states of layer {cut[0]}, site {cut[1]}; it holds "
                f"{', '.join(map(cut_name, self.cuts))}"
            )
        blocks = [self._tensor(shard, cut_name(cut)) for shard in self.shards]
        for shard, block in zip(self.shards, blocks, strict=True):
            expected = (shard.n_prompts, blocks[0].shape[-1])
            if tuple(block.shape) != expected or block.dtype != blocks[0].dtype:
                raise InputError(
                    f"{self.path / shard.file}: {cut_name(cut)} is {tuple(block.shape)} in {block.dtype}, expected "
                    f"{expected} in {blocks[0].dtype}; remove the file and run the same capture again"
                )
        return blocks

    def prompt(self, number: int) -> Tensor:
        """Return the token ids of one prompt. (T,)."""
        start = 0
        for shard in self.shards:
            if number < start + shard.n_prompts:
                stops = self._tensor(shard, "lengths").long().cumsum(0)
                ids = self._tensor(shard, "input_ids").long()
                first = int(stops[number - start - 1]) if number > start else 0
                return ids[first : int(stops[number - start])]
            start += shard.n_prompts
        raise IndexError(number)

    def prompts(self) -> Iterator[Tensor]:
        """Yield the token ids of every prompt, in their order. (T,) each."""
        for shard in self.shards:
            lengths = self._tensor(shard, "lengths").tolist()
            yield from self._tensor(shard, "input_ids").long().split(lengths)

    def lengths(self) -> Tensor:
        """Return the length of each prompt, in tokens. (N,)."""
        return torch.cat([self._tensor(shard, "lengths").long() for shard in self.shards])

    def _tensor(self, shard: Shard, name: str) -> Tensor:
        path = self.path / shard.file
        try:
            with open_tensors(path) as stream:
                if name not in stream.keys():  # noqa: SIM118
                    raise InputError(f"{path} holds no {name}; remove the file and run the same capture again")
                found: Tensor = stream.get_tensor(name)
                return found
        except SafetensorError as error:
            raise InputError(
                f"{path} is not a whole safetensors file ({error}); remove it and run the same capture again"
            ) from error
        except OSError as error:
            raise StorageError(f"cannot read {path}: {error.strerror or error}; check its permissions") from error


def read_manifest(path: Path) -> dict[str, Any]:
    """Read and check the manifest of a state folder."""
    file = path / "manifest.json"
    if not file.is_file():
        raise StorageError(
            f"{path} holds no manifest.json, so no captured states; make some with 'sipit collisions survey'"
        )
    try:
        manifest = read_json(file)
    except ValueError as error:
        raise InputError(f"{file} is not JSON ({error}); capture the states again") from error
    if not isinstance(manifest, dict) or (manifest.get("format"), manifest.get("version")) != (FORMAT, VERSION):
        raise InputError(f"{file} is not the manifest of captured states in version {VERSION}; capture them again")
    wrong = [key for key, kind in _KEYS.items() if type(manifest.get(key)) is not kind]
    try:
        if wrong:
            raise ValueError(f"{', '.join(wrong)} missing or of another type")
        for number, shard in enumerate(Shard(**entry) for entry in manifest["shards"]):
            counts = (shard.n_prompts, shard.n_bytes)
            if not (isinstance(shard.file, str) and _SHARD.fullmatch(shard.file)) or {*map(type, counts)} != {int}:
                raise ValueError(f"entry {number} of the shards names no shard")
        [cut_named(name) for name in manifest["cuts"]]
    except (ValueError, TypeError, AttributeError) as error:
        raise InputError(f"{file} is damaged ({error}); capture the states again") from error
    return cast("dict[str, Any]", manifest)


def check_shard(folder: Path, shard: Shard) -> None:
    """Refuse a shard that is missing or cut short."""
    path = folder / shard.file
    if not path.is_file():
        raise StorageError(f"{path} is missing; run the same capture again and only that shard is made anew")
    if path.stat().st_size != shard.n_bytes:
        raise InputError(
            f"{path} has {path.stat().st_size} bytes, its manifest says {shard.n_bytes}; run the same capture again "
            "and only that shard is made anew"
        )


def _write_shard(folder: Path, number: int, prompts: Sequence[Tensor], states: dict[str, Tensor]) -> Shard:
    """Write one shard, whole or not at all.

    Raises:
        StorageError: the folder cannot be written, or is full.
    """
    name = f"states-{number:05d}.safetensors"
    tensors = {
        "input_ids": torch.cat(list(prompts)).int(),
        "lengths": torch.tensor([len(ids) for ids in prompts], dtype=torch.int32),
        **{key: value.contiguous() for key, value in states.items()},
    }
    with whole_file(folder / name) as temporary:
        try:
            save_file(tensors, temporary)
        except SafetensorError as error:  # the library reports a full disk in its own class
            raise OSError(28, str(error)) from error
    return Shard(file=name, n_prompts=len(prompts), n_bytes=(folder / name).stat().st_size)


def _require_same(folder: Path, old: dict[str, Any], new: dict[str, Any]) -> None:
    """Refuse to go on with a capture of other prompts, cuts or weights."""
    for key in ("fingerprint", "dtype", "cuts", "prompts_sha256", "shard_size"):
        if old[key] != new[key]:
            raise MismatchError(
                f"{folder} holds a capture with another {key.replace('_', ' ')}; name another folder, or remove it"
            )


class StateWriter:
    """Fills a state folder shard by shard; what an interrupted capture of the same left is kept.

    Raises:
        StorageError: the folder cannot be made.
        MismatchError: it holds another capture.
    """

    def __init__(
        self,
        folder: Path | str,
        lm: LanguageModel,
        cuts: Sequence[Cut],
        *,
        n_prompts: int,
        sha256: str,
        shard_size: int,
        source: dict[str, Any],
    ) -> None:
        self._folder = Path(folder)
        self._cuts = cuts
        self._manifest: dict[str, Any] = {
            "format": FORMAT,
            "version": VERSION,
            "model": lm.name,
            "fingerprint": lm.fingerprint,
            "dtype": str(lm.dtype).removeprefix("torch."),
            "cuts": [cut_name(cut) for cut in cuts],
            "n_prompts": n_prompts,
            "prompts_sha256": sha256,
            "shard_size": shard_size,
            "source": source,
            "shards": [],
        }
        self._shards = _whole_shards(self._folder, self._manifest)

    def __contains__(self, number: int) -> bool:
        return number in self._shards

    def write(self, number: int, prompts: Sequence[Tensor], states: Sequence[Tensor]) -> None:
        """Write one shard and then the manifest that names it. States: (n, D) a cut."""
        named = {cut_name(cut): rows for cut, rows in zip(self._cuts, states, strict=True)}
        self._shards[number] = _write_shard(self._folder, number, prompts, named)
        self._write_manifest()

    def finish(self) -> StateFolder:
        """Return the folder, once every shard is there."""
        self._write_manifest()
        return StateFolder(self._folder)

    def _write_manifest(self) -> None:
        self._manifest["shards"] = [asdict(self._shards[i]) for i in sorted(self._shards)]
        write_json(self._folder / "manifest.json", self._manifest)


def _whole_shards(folder: Path, manifest: dict[str, Any]) -> dict[int, Shard]:
    """Return the whole shards that an interrupted capture of the same left, by number; make the folder if need be.

    Raises:
        StorageError: the folder cannot be made.
        MismatchError: it holds another capture.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StorageError(f"cannot make the folder {folder}: {error.strerror or error}; name another") from error
    if not (folder / "manifest.json").is_file():
        return {}
    old = read_manifest(folder)
    _require_same(folder, old, manifest)
    whole = {}
    for entry in old["shards"]:
        shard = Shard(**entry)
        try:
            check_shard(folder, shard)
        except (StorageError, InputError):
            continue
        whole[int(shard.file[7:-12])] = shard  # states-00000.safetensors
    return whole
