"""``hones push`` and ``hones pull``: profiles on the Hugging Face Hub."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from hones_steer.cli.output import command_parser, print_json, report_written
from hones_steer.errors import DataError
from hones_steer.profile import load_profile, save_profile
from hones_steer.store import SUFFIX


def push(argv: Sequence[str]) -> int:
    """``hones push REPO FILE...``: publish profiles on the Hugging Face Hub."""
    parser = command_parser(
        "push",
        "Publish profiles in a repository of the Hugging Face Hub, which is made if it does not exist, in one commit.\n"
        "Profiles of other tasks that are there stay. The model card is written from what the profiles say.",
        "hf auth login\n  hones push my-org/llava-profiles vqa.safetensors ocr.safetensors",
    )
    add = parser.add_argument
    add("repo", metavar="REPO", help="ORG/NAME")
    add("files", metavar="FILE", nargs="+", help="profiles (.safetensors)")
    add("--revision", metavar="BRANCH", help="an existing branch (default: main)")
    add("--private", action="store_true", default=None, help="if the repository is new, only its owners see it")
    add("--message", help="the commit's message")
    add("--json", action="store_true", help="print JSON instead of text")
    options = parser.parse_args(argv)
    profiles = [load_profile(file) for file in options.files]
    from hones_steer.hub import push_profile

    commit = push_profile(
        profiles, options.repo, revision=options.revision, private=options.private, message=options.message
    )
    tasks = [profile.task for profile in profiles]
    if options.json:
        print_json({"repo": options.repo, "commit": commit, "tasks": tasks})
    else:
        print(f"{', '.join(tasks)}: pushed; this very version is hub:{options.repo}@{commit}")
    return 0


def pull(argv: Sequence[str]) -> int:
    """``hones pull REPO --out FOLDER``: download profiles from the Hugging Face Hub and check them."""
    parser = command_parser(
        "pull",
        "Download profiles from a repository of the Hugging Face Hub, check them against its digests, and write\n"
        "FOLDER/<task>.safetensors for each. Only a commit as revision always gives the same profiles.",
        "hones pull my-org/llava-profiles --out profiles\n"
        "  hones pull my-org/llava-profiles --task vqa --revision COMMIT --out .",
    )
    add = parser.add_argument
    add("repo", metavar="REPO", help="ORG/NAME")
    add("--out", required=True, metavar="FOLDER", type=Path, help="where to write them; profiles there are replaced")
    add("--task", action="append", help="only this task's profile (may be given several times)")
    add("--revision", metavar="REV", help="a branch, a tag or a commit (default: main)")
    add("--json", action="store_true", help="print JSON instead of text")
    options = parser.parse_args(argv)
    from hones_steer.hub import pull_profiles

    pulled = pull_profiles(options.repo, options.task, revision=options.revision)
    try:
        options.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(f"{options.out}: cannot be made: {error.strerror}") from error
    files = [(profile, options.out / (task + SUFFIX)) for task, profile in pulled.profiles.items()]
    for profile, file in files:
        save_profile(profile, file)
    report_written(files, {"repo": pulled.repo, "commit": pulled.commit}, options.json)
    return 0
