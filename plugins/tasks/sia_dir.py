"""The task ``sia-dir``: a task directory of the peer SIA as it is; ``bascule run --task-dir DIR``.

An episode is the whole task: the directory's own agent runs in the sandbox (:mod:`.sia_dir_harness`), and the answer is
the submission that it leaves. SIA has no held-out part: train, dev and sealed ask the same, once each or ``repeats``
times, so that a score on dev or sealed says how well this very task is done, and nothing about others.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

from bascule.plugins.task import Allows, Baseline, Example, PrivateFace, PublicFace, Tool
from bascule.plugins.tasks import sia_dir_files as directory
from bascule.plugins.tasks.harness_files import manifest_text
from bascule.plugins.tasks.sia_dir_private import DISTRIBUTIONS, Grader, imported, private_face
from bascule.plugins.tasks.sia_dir_submission import NotASubmission, pack
from bascule.plugins.tasks.splits import constant_baseline
from bascule.schemas.errors import ConfigError
from bascule.schemas.harness import HarnessManifest

NAME = "sia-dir"
MOST_REPEATS = 64
#: What one reply may be long: the agents ask for up to 8192 tokens, and get up to four times this.
MAX_TOKENS = 2048
_HARNESS = {"harness.py": "sia_dir_harness", "sdk.py": "sia_dir_sdk", "submission.py": "sia_dir_submission"}
_STEM = re.compile(r"[^A-Za-z0-9_.-]+")
_PARAMS = ("path", "sha256", "repeats", "grader", "metric", "agent", "entry", "submission", "beside")
_NO_SPLITS = (
    "SIA has no held-out part: train, dev and sealed ask the same whole task, and there are no train answers. "
    "What is to be answered is the submission that the agent leaves; the score is the share of right items."
)


def named(text: str) -> dict[str, Any] | None:
    """The configuration of the SIA directory that a path names; None where it names none.

    Raises:
        ConfigError: it cannot be read.
    """
    path = Path(text).expanduser()
    if not directory.is_directory_of_sia(path):
        return None
    path = directory.checked(path)
    return {"name": NAME, "params": {"path": str(path), "sha256": directory.digest(path)}}


class SiaDir:
    """The task ``sia-dir``.

    Parameters: ``path`` of the directory and its ``sha256`` where it is to be that one; ``repeats`` (1), examples of
    each split; ``grader`` (``ours`` where it knows the form, or ``theirs``); ``metric``, where the figure stands in
    their ``results.json``; ``agent``, a file or folder instead of the reference agent, and its ``entry``;
    ``submission``, patterns of the files that are handed in; ``beside``, a folder of the directory whose files agents
    get as well, such as lawbench's ``data/training_data``.
    """

    name = NAME
    summary = "a SIA task directory as it is: --task-dir DIR; `bascule unpack-sia DIR` writes four of them"

    def __init__(self, params: dict[str, Any]) -> None:
        unknown = sorted(set(params) - set(_PARAMS))
        if unknown:
            raise ConfigError(
                f"The task {NAME} has no parameter {unknown[0]!r}.", next_step=f"It has {', '.join(_PARAMS)}."
            )
        self._given = params
        self._repeats = params.get("repeats", 1)
        if isinstance(self._repeats, bool) or not isinstance(self._repeats, int):
            raise _odd("repeats", self._repeats, f"an integer from 1 to {MOST_REPEATS}")
        if not 1 <= self._repeats <= MOST_REPEATS:
            raise _odd("repeats", self._repeats, f"an integer from 1 to {MOST_REPEATS}")
        self._grader: Grader | None = params.get("grader")
        if self._grader is not None and self._grader not in get_args(Grader):
            raise _odd("grader", self._grader, "ours or theirs")
        self._patterns = params.get("submission", [])
        if not isinstance(self._patterns, list) or not all(isinstance(p, str) for p in self._patterns):
            raise _odd("submission", self._patterns, 'a list of names such as ["submission.csv"]')
        for name in ("path", "sha256", "metric", "agent", "entry", "beside"):
            if not isinstance(params.get(name, ""), str):
                raise _odd(name, params[name], "a text")

    def _path(self) -> Path:
        """The directory, as it was recorded."""
        if not self._given.get("path"):
            raise ConfigError(f"The task {NAME} needs a directory.", next_step="Give --task-dir DIR.")
        path = directory.checked(Path(self._given["path"]))
        if (recorded := self._given.get("sha256")) is not None and (now := directory.digest(path)) != recorded:
            raise ConfigError(
                f"The task directory {path} has changed: its sha256 is {now}, and was {recorded}.",
                next_step="Put the recorded files back, or start a new run.",
            )
        return path

    def _shape(self, path: Path) -> directory.Shape:
        return directory.shape_of(directory.files_of(path / "data" / "public"))

    def public(self) -> PublicFace:
        path = self._path()
        files = directory.public_files(path, self._given.get("beside", ""))
        shape = directory.shape_of(directory.files_of(path / "data" / "public"))
        restricted = shape.form == "letters"
        text = files["task.md"].decode("utf-8", "replace").strip()
        shown = directory.shown(files, restricted=restricted)
        question = f"The whole task of {path.name}; its text is task.md among the public files."

        def examples(split: str) -> tuple[Example, ...]:
            ids = [f"{split}-{i + 1}" for i in range(self._repeats)]
            return tuple(Example(id=i, group=i, input={"question": question, "files": shown}) for i in ids)

        train = examples("train")
        return PublicFace(
            name=_STEM.sub("-", path.name),
            version=directory.digest(path, ("data/public", "reference"))[:16],
            description=f"{text}\n\n{_NO_SPLITS}",
            train=train,
            answers={e.id: "" for e in train},
            dev=examples("dev"),
            sealed=examples("sealed"),
            max_answer_tokens=MAX_TOKENS,
            source=f"a SIA task directory of the user's, {path.name}",
            licence="the directory's own; sia-agent 0.6.0 is MIT, the data in it are others'",
            allows=Allows(
                data=False,
                packages=tuple(DISTRIBUTIONS.values()),
                memory_mb=4096,
                disk_mb=_disk_mb(files),
            ),
            restricted=restricted,
        )

    def private(self) -> PrivateFace:
        path = self._path()
        public = directory.files_of(path / "data" / "public")
        private = directory.files_of(path / "data" / "private")
        shape = directory.shape_of(public)
        metric = self._given.get("metric", "")
        return private_face(str(path), shape, public, private, self._grader, metric, self._patterns)

    def harness(self) -> dict[str, str]:
        path = self._path()
        files = directory.public_files(path, self._given.get("beside", ""))
        shape = self._shape(path)
        agent = directory.agent(path, self._given.get("agent"), self._given.get("entry"))
        params: dict[str, Any] = {"entry": agent.entry, "files": sorted(agent.files), "longest_pause": 0.05}
        if shape.fields:
            params["fields"] = list(shape.fields)
        if self._patterns:
            params["submission"] = self._patterns
        if shape.form == "letters":
            params["compress"] = False
        manifest = HarnessManifest(
            name="sia-agent",
            timeout_seconds=900.0,
            max_model_calls=4096,
            max_output_bytes=16 * 1024 * 1024,
            params=params,
            packages=imported(agent.files),
            memory_mb=2048,
            disk_mb=_disk_mb(files),
            processes=128,
        )
        here = Path(__file__).parent
        return {
            **{name: (here / f"{module}.py").read_text(encoding="utf-8") for name, module in _HARNESS.items()},
            "manifest.json": manifest_text(manifest),
            "system_prompt.md": "The agent in agent/ is a SIA agent; what it tells the model stands in its own code.\n",
            **agent.files,
        }

    def tools(self, example: Example) -> Mapping[str, Tool]:
        return {}

    def baselines(self, public: PublicFace) -> Sequence[Baseline]:
        """Submissions that need no model: the directory's sample, and each letter for all questions."""
        path = self._path()
        shape = self._shape(path)
        found = {}
        if shape.form == "table":
            sample = (path / "data" / "public" / "sample_submission.csv").read_text(encoding="utf-8-sig")
            found["sample-submission"] = {"submission.csv": sample}
        if shape.form == "letters":
            for letter in "ABCD":
                found[f"all-{letter}"] = {"results/submission.json": _letters(shape.ids, letter)}
        baselines = []
        for name, files in found.items():
            try:
                baselines.append(constant_baseline(name, public, pack(files)))
            except NotASubmission:
                continue  # a sample too long to be an answer is no baseline
        return (*baselines, constant_baseline("nothing", public, ""))

    def defaults(self) -> dict[str, Any]:
        return {"evaluation": {"train_groups": 1, "train_samples": 1}, "max_generations": 2}


def _letters(ids: Sequence[str], letter: str) -> str:
    import json

    details = [{"question_id": int(i) if i.isdecimal() else i, "model_answer": letter} for i in ids]
    return json.dumps({"details": details}, separators=(",", ":"))


def _disk_mb(files: Mapping[str, bytes]) -> int:
    return 128 + 4 * (sum(map(len, files.values())) >> 20)


def _odd(name: str, value: object, what: str) -> ConfigError:
    return ConfigError(f"{name} of the task {NAME} is {value!r:.100}.", next_step=f"Give {what}.")
