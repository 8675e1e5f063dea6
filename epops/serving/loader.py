"""A checkpoint's tensors into a sharded model on the meta device, each rank reading those of its own experts only.

Where the files hold the matrices of each expert as tensors of their own, transformers' own conversion rules stack them; they are
given the tensors of this rank's experts and no others.
"""

from __future__ import annotations

import copy
import re
import warnings
from typing import Any

import torch
from torch import Tensor, nn

from ..models.shard import local_range, local_shape, slice_of
from ..models.site import Shard, Site, site_of, sites
from .checkpoint import Checkpoint


class Loader:
    """Puts a checkpoint's tensors into a sharded model on the meta device, one after another."""

    def __init__(
        self, model: Any, whole: dict[str, Tensor], mapping: list[Any], checkpoint: Checkpoint, rank: int, device: Any
    ) -> None:
        self.model, self.whole, self.checkpoint, self.rank, self.device = model, whole, checkpoint, rank, device
        self.mapping = mapping
        self.missing = set(whole)
        self.unexpected: list[str] = []
        self.sharded: dict[str, tuple[Site, Shard]] = {}
        """Name in the unsharded model → how it lies on the ranks."""
        self.single: dict[str, tuple[str, int, Site]] = {}
        """Likewise for experts that are modules of their own → name of the stacked tensor, expert."""
        for prefix, module in sites(model).items():
            site = site_of(module)
            assert site is not None
            for path, shard in site.shards.items():
                target = f"{prefix}.{path}" if prefix else path
                if path in site.names:
                    names = site.names[path]
                    self.single.update({_join(prefix, name): (target, e, site) for e, name in enumerate(names)})
                else:
                    self.sharded[target] = (site, shard)

    def load(self) -> None:
        from transformers.core_model_loading import WeightConverter

        for target, sources in self._sources().items():
            converter = next((rule for rule, _ in sources.values() if isinstance(rule, WeightConverter)), None)
            if converter is not None:
                names = {pattern: found for pattern, (_, found) in sources.items()}
                self._convert(target, converter, names)
            else:
                ((_, (name, *_)),) = sources.values()
                self._copy(target, name)
        self._check()

    def _sources(self) -> dict[str, dict[str, tuple[Any, list[str]]]]:
        """Name in the model → pattern → (its rule, names in the files that match it, in the order of their numbers)."""
        from transformers.core_model_loading import (
            WeightConverter,
            WeightRenaming,
            dot_natural_key,
            rename_source_key,
        )

        renamings = [rule for rule in self.mapping if isinstance(rule, WeightRenaming)]
        converters = [rule for rule in self.mapping if isinstance(rule, WeightConverter)]
        of_pattern = {pattern: rule for rule in converters for pattern in rule.source_patterns}
        prefix = self.model.base_model_prefix
        found: dict[str, dict[str, tuple[Any, list[str]]]] = {}
        for name in sorted(self.checkpoint.files, key=dot_natural_key):
            target, pattern = rename_source_key(name, renamings, converters, prefix, self.whole)
            if target not in self.whole and name in self.whole:
                target, pattern = name, None
            if target not in self.whole:
                self.unexpected.append(name)
                continue
            rule = of_pattern[pattern] if pattern is not None else None
            found.setdefault(target, {}).setdefault(pattern or name, (rule, []))[1].append(name)
        return found

    # ---- one tensor --------------------------------------------------------------------------------------------------------

    def _copy(self, target: str, name: str) -> None:
        """A tensor that is in the file as it is in the model."""
        if target in self.sharded:
            site, shard = self.sharded[target]
            lo, hi = local_range(shard, site, self.rank)
            if self.checkpoint.shape(name)[0] == shard.full_rows:
                self._set_expert(target, self.checkpoint.tensor(name, (lo, hi)).clone() if hi > lo else None)
                return
        if target in self.single:
            self._copy_single(target, name)
            return
        self._set(target, self.checkpoint.tensor(name).clone())

    def _copy_single(self, target: str, name: str) -> None:
        """A tensor of one expert, into its slot where it is ours."""
        stacked, expert, site = self.single[target]
        slots = site.num_slots
        self.missing.discard(target)
        parameter = self.model.get_parameter(stacked)
        if parameter.is_meta:
            self._assign(stacked, torch.zeros(parameter.shape, dtype=parameter.dtype, device=self.device))
        if expert // slots == self.rank:
            with torch.no_grad():
                self.model.get_parameter(stacked)[expert % slots].copy_(self.checkpoint.tensor(name))

    def _convert(self, target: str, rule: Any, names: dict[str, list[str]]) -> None:
        """Tensors that transformers' rule makes one (or several) of: of experts, those of this rank, where the rule lets us."""
        if target in self.sharded:
            site, shard = self.sharded[target]
            lo, hi = local_range(shard, site, self.rank)
            rows = self.whole[target].shape[0]
            if shard.unit == 1 and all(len(found) == shard.rows == rows for found in names.values()):
                if lo == hi:
                    self._set_expert(target, None)
                    return
                made = self._made(target, rule, {pattern: found[lo:hi] for pattern, found in names.items()})
                expected = torch.Size((hi - lo, *self.whole[target].shape[1:]))
                if list(made) == [target] and made[target].shape == expected:
                    self._set_expert(target, made[target])
                    return
        for name, value in self._made(target, rule, names).items():
            if name in self.sharded:
                site, shard = self.sharded[name]
                self._set_expert(name, slice_of(value, shard, site, self.rank))
            else:
                self._set(name, value)

    def _made(self, target: str, rule: Any, names: dict[str, list[str]]) -> dict[str, Tensor]:
        converter = copy.deepcopy(rule)
        files = set()
        for pattern, found in names.items():
            for name in found:
                value = self.checkpoint.tensor(name)
                files.add(value.untyped_storage().data_ptr())
                converter.add_tensor(target, name, pattern, value)
        made = converter.convert(target, model=self.model, config=self.model.config)
        made = {name: value[0] if isinstance(value, list) else value for name, value in made.items()}
        # What is still a view of a mapped file must not stay one.
        return {n: v.clone() if v.untyped_storage().data_ptr() in files else v for n, v in made.items()}

    # ---- into the model ----------------------------------------------------------------------------------------------------

    def _set_expert(self, target: str, rows: Tensor | None) -> None:
        """This rank's rows, with zeros in the slots that no expert has; None: no row is ours."""
        site, shard = self.sharded[target]
        shape = local_shape(self.whole[target].shape, shard, site)
        if rows is None or rows.shape != shape:
            held = 0 if rows is None else rows.shape[0]
            filled = torch.zeros(shape, dtype=self.whole[target].dtype, device=self.device)
            if rows is not None:
                filled[:held].copy_(rows)
            rows = filled
        self._set(target, rows, shape)

    def _set(self, target: str, value: Tensor, shape: torch.Size | None = None) -> None:
        expected = shape or self.whole[target].shape
        if value.shape != expected:
            raise ValueError(
                f"epops.serving.load: {target}: expected {tuple(expected)} as the configuration says, got "
                f"{tuple(value.shape)} in {self.checkpoint.folder}; the configuration is not that of these weights"
            )
        self.missing.discard(target)
        self._assign(target, value.to(device=self.device, dtype=self.whole[target].dtype))

    def _assign(self, target: str, value: Tensor) -> None:
        parent, _, name = target.rpartition(".")
        holder = self.model.get_submodule(parent)
        if name in holder._parameters:
            value = nn.Parameter(value, requires_grad=holder._parameters[name].requires_grad)
            holder._parameters[name] = value
        else:
            holder._buffers[name] = value
        value._is_hf_initialized = True

    def _check(self) -> None:
        ignored = "|".join(self.model._keys_to_ignore_on_load_missing or ()) or None
        tied = getattr(self.model, "all_tied_weights_keys", {})
        absent = [
            name
            for name in sorted(self.missing)
            if name not in tied and not (ignored is not None and re.search(ignored, name))
        ]
        if absent:
            raise ValueError(
                f"epops.serving.load: {self.checkpoint.folder}: expected all weights of {type(self.model).__name__}, got none "
                f"for {', '.join(absent[:4])}{f' and {len(absent) - 4} more' if len(absent) > 4 else ''}; the checkpoint is "
                "incomplete, or of another model"
            )
        patterns = [*(self.model._keys_to_ignore_on_load_unexpected or ()), r"rotary_emb\.inv_freq"]
        unused = [name for name in self.unexpected if not re.search("|".join(patterns), name)]
        if unused:
            more = f" and {len(unused) - 4} more" if len(unused) > 4 else ""
            warnings.warn(
                f"epops.serving.load: {self.checkpoint.folder}: {type(self.model).__name__} has no place for "
                f"{', '.join(unused[:4])}{more}",
                stacklevel=4,
            )


def _join(prefix: str, name: str) -> str:
    return f"{prefix}.{name}" if prefix else name
