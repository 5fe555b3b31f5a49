"""Hugging Face datasets: streamed record by record, from the Hub or a folder in its layout.

Knows the optional package `datasets`, and which commit of a dataset is read. Refuses to know what a record means.
"""

from __future__ import annotations

import hashlib
import importlib
import itertools
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import huggingface_hub
import pyarrow as pa
from huggingface_hub.errors import HTTPError

from tracer.data.rows import Columns
from tracer.errors import JobError, quoted

_SECONDS = 20.0  # to wait for the Hub when a commit is asked for


class Hub:
    """A dataset's split as an iterator of dicts.

    Args:
        name: an id on the Hub, such as ``"org/name"``, or a local folder.
        config, split, revision: as in `datasets.load_dataset`.

    Raises:
        JobError: `datasets` is not installed, or a revision of a local folder.
    """

    def __init__(self, name: str, config: str | None, split: str, revision: str | None) -> None:
        self.name, self.config, self.split, self.revision = name, config, split, revision
        self.shown = f"dataset {quoted(name, 200)}"
        self.local = os.path.isdir(name)
        if self.local and revision is not None:
            raise JobError(
                f"revision {quoted(revision)}", f"has no effect on the folder {quoted(name)}", "leave it out"
            )
        self._features: Any = {}
        try:
            self._library: Any = importlib.import_module("datasets")
        except ImportError as error:
            rule = "needs the package datasets"
            raise JobError(self.shown, rule, "pip install 'neuron-tracer[datasets]'") from error

    def open(self) -> tuple[list[str], bool, Iterator[dict[str, Any]]]:
        """Columns, whether a record may have others, and the records."""
        with self._accessing():
            try:
                rows = self._library.load_dataset(
                    self.name, self.config, split=self.split, revision=self.revision, streaming=True
                )
            except StopIteration:  # datasets looks for the columns of a file that is empty
                return [], True, iter(())
            features = rows.features
            if features is not None:
                self._features = features
                return list(features), False, self._records(rows)
            # The columns of some text formats are known from their records alone.
            records = iter(rows)
            first = next(records, None)
        if first is None:
            return [], True, iter(())
        return list(first), True, self._records(itertools.chain([first], records))

    def check(self, chosen: Columns) -> None:
        """Refuse class numbers as tokens.

        Raises:
            JobError: a target or foil whose column is a class label.
        """
        for name in ("target", "target_ids", "foil", "foil_ids"):
            column = chosen.fields.get(name)
            if column is not None and isinstance(self._features.get(column), self._library.ClassLabel):
                rule = f"of {self.shown} holds class numbers, which are not tokens"
                raise JobError(f"column {quoted(column)}", rule, "list under columns those that are to be read")

    def _records(self, rows: Any) -> Iterator[dict[str, Any]]:
        with self._accessing():
            yield from rows

    def digest(self) -> str:
        """What identifies the content: the commit, or SHA-256 of a local folder's data files."""
        with self._accessing():
            if not self.local:
                return self._commit()
            files = self._library.load_dataset_builder(self.name, self.config).config.data_files or {}
            paths = files.get(self.split) or list(itertools.chain.from_iterable(files.values()))
            if not paths:
                raise JobError(self.shown, "has no data files", "name a folder that holds some")
            sha256 = hashlib.sha256()
            for path in paths:
                with open(path, "rb") as file:
                    inner = hashlib.file_digest(file, "sha256").hexdigest()
                sha256.update(f"{json.dumps(os.path.basename(path))} {inner}\n".encode())
        return sha256.hexdigest()

    def _commit(self) -> str:
        try:
            commit = huggingface_hub.dataset_info(self.name, revision=self.revision, timeout=_SECONDS).sha
        except (OSError, HTTPError):
            commit = None
        # Without the Hub: the cached copy, whose hash is the commit it was loaded from.
        return commit or self._library.load_dataset_builder(self.name, self.config, revision=self.revision).hash

    @contextmanager
    def _accessing(self) -> Iterator[None]:
        """Errors of `datasets`, the Hub or Arrow as a `JobError`."""
        known = (OSError, HTTPError, ValueError, NotImplementedError, pa.ArrowException)
        try:
            yield
        except (*known, self._library.exceptions.DatasetsError) as error:
            rule = str(error).strip() or type(error).__name__
            raise JobError(
                self.shown, f"cannot be read: {rule[:200]}", "check id, config, split and revision"
            ) from error
