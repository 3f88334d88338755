"""Judge files: every error names its file, and no packaged judge changes without a new version."""

from __future__ import annotations

from pathlib import Path

import pytest

from rlaif import resources
from rlaif.errors import UsageError
from rlaif.judge import judge_file
from rlaif.judge.judge_file import find_judge, judge_folders, load_judge
from tests.conftest import ROOT

COMPARE = """name = "mine"
version = "1"
kind = "compare"
[verdicts]
a = "A"
b = "B"
"""
RATE = """name = "mine"
version = "1"
kind = "rate"
[scale]
low = 1
high = 5
[[aspects]]
name = "clear"
text = "Is it clear?"
"""
COMPARE_PROMPT = "# System\nRules.\n\n# User\n{conversation}\n{reference}\n{response_a}\n{response_b}\n{reply}\n"
RATE_PROMPT = "# System\nFrom {low} to {high}.\n\n# User\n{conversation}\n{reference}\n{response}\n{aspect}\n{reply}\n"


def write_judge_folder(folder: Path, toml: str | bytes = COMPARE, prompt: str | bytes = COMPARE_PROMPT) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in (("judge.toml", toml), ("prompt.md", prompt)):
        (folder / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    return folder


def test_the_two_examples_are_valid(tmp_path: Path) -> None:
    """The invalid files below are variations of these."""
    compare = load_judge(write_judge_folder(tmp_path / "mine"))
    assert (compare.file.kind, compare.file.reasoning, compare.system) == ("compare", "none", "Rules.")
    assert compare.user.startswith("{conversation}")
    assert compare.user.endswith("{reply}")
    rate = load_judge(write_judge_folder(tmp_path / "mine", RATE, RATE_PROMPT))
    assert [aspect.name for aspect in rate.file.aspects] == ["clear"]


# (part of judge.toml, its replacement, the error)
WRONG_TOML = [
    ('kind = "compare"', 'kind = "compare', "not valid TOML"),
    ('kind = "compare"', 'kind = "pairwise"', "kind: Input should be 'compare', 'rate', 'classify' or 'reward'"),
    ('kind = "compare"\n', "", "kind: Field required"),
    ('name = "mine"\n', "", "name: Field required"),
    ('name = "mine"', 'name = "Mine"', "name: String should match"),
    ('name = "mine"', 'name = "../mine"', "name: String should match"),
    ('name = "mine"', 'name = ""', "name: String should match"),
    ('name = "mine"', "name = 7", "name: Input should be a valid string"),
    ('name = "mine"', 'name = "yours"', "name is 'yours', but the folder is 'mine'"),
    ('version = "1"\n', "", "version: Field required"),
    ('version = "1"', "version = 1", "version: Input should be a valid string"),
    ('version = "1"', 'version = "1 b"', "version: String should match"),
    ('version = "1"', 'version = ""', "version: String should match"),
    ('version = "1"', 'verison = "1"', "unknown key 'verison'. Did you mean 'version'?"),
    ('version = "1"', 'version = "1"\nmodel = "gpt"', "unknown key 'model'"),
    ('version = "1"', 'version = "1"\nreasoning = "last"', "reasoning: Input should be 'none' or 'first'"),
    ('version = "1"', 'version = "1"\nversion = "2"', "not valid TOML"),
    ('a = "A"\nb = "B"', 'a = "A"', "verdicts.b: Field required"),
    ('b = "B"', 'b = "B"\ntye = "C"', "unknown key 'verdicts.tye'. Did you mean 'tie'?"),
    ('b = "B"', 'b = "A"', "verdicts: verdict words must differ in their first letter"),
    ('b = "B"', 'b = "a"', "verdicts: verdict words must differ in their first letter"),
    ('b = "B"', 'b = "B"\ntie = "both"', "verdicts: verdict words must differ in their first letter"),
    ('b = "B"', 'b = ""', "verdicts.b: String should match"),
    ('b = "B"', 'b = " "', "verdicts.b: String should match"),
    ('b = "B"', 'b = "B "', "verdicts.b: String should match"),
    ('b = "B"', 'b = "(B)"', "verdicts.b: String should match"),
    ('b = "B"', "b = 2", "verdicts.b: Input should be a valid string"),
    ('[verdicts]\na = "A"\nb = "B"\n', "", "a judge of kind 'compare' needs [verdicts]"),
    ("[verdicts]", "[verdict]", "unknown key 'verdict'. Did you mean 'verdicts'?"),
    (
        "[verdicts]",
        '[[aspects]]\nname = "x"\ntext = "y"\n[verdicts]',
        "kind 'compare' cannot have [[aspects]]",
    ),
]
WRONG_RATE = [
    ("low = 1", "low = -1", "scale.low: Input should be greater than or equal to 0"),
    ("high = 5", "high = 10", "scale.high: Input should be less than or equal to 9"),
    ("high = 5", "high = 1", "scale: high must be above low"),
    ("high = 5", "high = 4.5", "scale.high: Input should be a valid integer"),
    ("high = 5", 'high = "5"', "scale.high: Input should be a valid integer"),
    ("high = 5", "height = 5", "unknown key 'scale.height'. Did you mean 'high'?"),
    ('[[aspects]]\nname = "clear"\ntext = "Is it clear?"\n', "", "a judge of kind 'rate' needs [[aspects]]"),
    ("[[aspects]]", "[aspects]", "aspects: Input should be a valid list"),
    ('name = "clear"', 'name = "Clear one"', "aspects.0.name: String should match"),
    ('name = "clear"', 'nam = "clear"', "unknown key 'aspects.0.nam'. Did you mean 'name'?"),
    ('text = "Is it clear?"', 'text = " "', "aspects.0.text: String should match"),
    ('text = "Is it clear?"', 'text = "x"\n[[aspects]]\nname = "clear"\ntext = "y"', "two aspects have the same name"),
    ("[scale]", '[verdicts]\na = "A"\nb = "B"\n[scale]', "kind 'rate' cannot have [verdicts]"),
]
# (part of prompt.md, its replacement, the error)
WRONG_PROMPT = [
    ("# System", "# system", "needs two parts"),
    ("# System\nRules.\n\n", "", "needs two parts"),
    ("# User", "## User", "needs two parts"),
    ("# System", "Hello\n# System", "needs two parts"),
    ("Rules.", "Rules.\n# System\nMore.", "needs two parts"),
    ("{reply}", "{reply}\n# User\nAgain", "needs two parts"),
    ("{response_a}", "", "the user part needs {response_a}"),
    ("{response_a}\n{response_b}", "", "the user part needs {response_a}, {response_b}"),
    ("{conversation}", "", "the user part needs {conversation}"),
    ("{reply}", "", "the user part needs {reply}"),
    ("{response_a}", "{response_a} {response_c}", "unknown placeholder {response_c}. Did you mean 'response_b'?"),
    ("{response_a}", "{Response_A}", "unknown placeholder {Response_A}. Did you mean 'response_a'?"),
    ("{response_a}", "{response-a}", "unknown placeholder {response-a}. Did you mean 'response_a'?"),
    ("{reference}", "{ reference }", "unknown placeholder { reference }. Did you mean 'reference'?"),
    ("{reply}", "{reply} {aspect}", "unknown placeholder {aspect}"),
    ("Rules.", "Rules for {ansver}.", "unknown placeholder {ansver}. Available: checklist, conversation, reference,"),
    ("{response_a}", "{response_a}{response_a}", "the user part has {response_a} more than once"),
    ("Rules.", "Rules for {response_a}.", "{response_a} must not be in the system part"),
    ("Rules.", "Rules for {conversation}, {reference}.", "{conversation}, {reference} must not be in the system part"),
]
assert len(WRONG_TOML) + len(WRONG_RATE) + len(WRONG_PROMPT) >= 25


@pytest.mark.parametrize(("part", "instead", "message"), WRONG_TOML)
def test_an_invalid_judge_file_is_an_error_with_its_location(
    tmp_path: Path, part: str, instead: str, message: str
) -> None:
    assert part in COMPARE
    folder = write_judge_folder(tmp_path / "mine", COMPARE.replace(part, instead))
    with pytest.raises(UsageError) as caught:
        load_judge(folder)
    assert message in caught.value.message
    assert caught.value.location == str(folder / "judge.toml")


@pytest.mark.parametrize(("part", "instead", "message"), WRONG_RATE)
def test_an_invalid_rating_file_is_an_error_with_its_location(
    tmp_path: Path, part: str, instead: str, message: str
) -> None:
    assert part in RATE
    folder = write_judge_folder(tmp_path / "mine", RATE.replace(part, instead), RATE_PROMPT)
    with pytest.raises(UsageError) as caught:
        load_judge(folder)
    assert message in caught.value.message
    assert caught.value.location == str(folder / "judge.toml")


@pytest.mark.parametrize(("part", "instead", "message"), WRONG_PROMPT)
def test_an_invalid_prompt_is_an_error_with_its_location(tmp_path: Path, part: str, instead: str, message: str) -> None:
    assert part in COMPARE_PROMPT
    folder = write_judge_folder(tmp_path / "mine", COMPARE, COMPARE_PROMPT.replace(part, instead))
    with pytest.raises(UsageError) as caught:
        load_judge(folder)
    assert message in caught.value.message
    assert caught.value.location == str(folder / "prompt.md")


@pytest.mark.parametrize("name", ["judge.toml", "prompt.md"])
@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda file: file.unlink(), "cannot be read: No such file or directory"),
        (lambda file: (file.unlink(), file.mkdir()), "cannot be read: Is a directory"),
        (lambda file: file.write_bytes(b"# \xff\xfe"), "not UTF-8 text, at byte 2"),
        (lambda file: file.write_bytes(b""), ""),
        (lambda file: file.write_bytes(b"\0" * 100), ""),
    ],
    ids=["absent", "a folder", "not UTF-8", "empty", "zeros"],
)
def test_unreadable_files_are_errors_with_their_location(
    tmp_path: Path, name: str, spoil: object, message: str
) -> None:
    folder = write_judge_folder(tmp_path / "mine")
    assert callable(spoil)
    spoil(folder / name)
    with pytest.raises(UsageError) as caught:
        load_judge(folder)
    assert caught.value.location == str(folder / name)
    assert message in caught.value.message


def test_windows_files_are_read(tmp_path: Path) -> None:
    """Some editors save a byte order mark and CRLF. The judge stays the same."""
    plain = load_judge(write_judge_folder(tmp_path / "mine"))
    files = [b"\xef\xbb\xbf" + text.replace("\n", "\r\n").encode() for text in (COMPARE, COMPARE_PROMPT)]
    assert load_judge(write_judge_folder(tmp_path / "mine", *files)).hash == plain.hash


# Lookup


def test_judges_are_found_by_name_and_by_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    packaged = find_judge("helpful")
    assert packaged.folder == resources.judges()["helpful"]
    text = (packaged.folder / "judge.toml").read_text().replace('version = "2"', 'version = "2-mine"')
    write_judge_folder(tmp_path / "judges" / "helpful", text, (packaged.folder / "prompt.md").read_text())
    assert find_judge("helpful").file.version == "2-mine"  # ./judges overrides the packaged judges
    assert judge_folders()["quality"] == resources.judges()["quality"]
    write_judge_folder(tmp_path / "judges" / "mine")
    write_judge_folder(tmp_path / "elsewhere" / "mine", COMPARE.replace('"1"', '"9"'))
    assert find_judge("mine").file.version == "1"
    for path in ("elsewhere/mine", str(tmp_path / "elsewhere" / "mine/")):
        assert find_judge(path).file.version == "9"
    monkeypatch.chdir(tmp_path / "elsewhere" / "mine")
    assert load_judge(Path()).name == "mine"


def test_an_unknown_name_is_an_error_with_the_closest_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name, message in {
        "helpfull": "unknown judge 'helpfull'. Did you mean 'helpful'?",
        "zzz": "Available: helpful, quality",
        "judges/none": "unknown judge 'judges/none'.",
        "": "unknown judge ''.",
    }.items():
        with pytest.raises(UsageError) as caught:
            find_judge(name)
        assert message in caught.value.message
        assert "rlaif judges list" in str(caught.value)


# Hashes and versions


def test_every_change_of_content_changes_the_hash(tmp_path: Path) -> None:
    changes = [
        (COMPARE, COMPARE_PROMPT),
        (COMPARE.replace('"1"', '"2"'), COMPARE_PROMPT),
        (COMPARE.replace('b = "B"', 'b = "C"'), COMPARE_PROMPT),
        (COMPARE + 'tie = "C"\n', COMPARE_PROMPT),
        (COMPARE.replace('kind = "compare"', 'kind = "compare"\nreasoning = "first"'), COMPARE_PROMPT),
        (COMPARE.replace('kind = "compare"', 'kind = "compare"\ndescription = "x"'), COMPARE_PROMPT),
        (COMPARE, COMPARE_PROMPT.replace("Rules.", "Rules!")),
        (COMPARE, COMPARE_PROMPT.replace("Rules.", "")),
        (COMPARE, COMPARE_PROMPT.replace("{response_a}\n{response_b}", "{response_b}\n{response_a}")),
        (COMPARE, COMPARE_PROMPT.replace("{reply}", "Now. {reply}")),
        (RATE, RATE_PROMPT),
        (RATE.replace("Is it clear?", "Is it clear"), RATE_PROMPT),
        (RATE.replace("high = 5", "high = 6"), RATE_PROMPT),
    ]
    hashes = [load_judge(write_judge_folder(tmp_path / "mine", *change)).hash for change in changes]
    assert len(set(hashes)) == len(changes)
    assert all(len(digest) == 16 and int(digest, 16) >= 0 for digest in hashes)


def test_a_change_without_content_does_not_change_the_hash(tmp_path: Path) -> None:
    """Comments, trailing blank lines, an explicit default; and so a setting that a later version may add."""
    same = [
        (COMPARE, COMPARE_PROMPT),
        ("# a comment\n" + COMPARE, COMPARE_PROMPT + "\n\n"),
        (COMPARE.replace('kind = "compare"', 'kind = "compare"\nreasoning = "none"'), COMPARE_PROMPT),
    ]
    folders = [write_judge_folder(tmp_path / str(number) / "mine", *files) for number, files in enumerate(same)]
    assert len({load_judge(folder).hash for folder in folders}) == 1


def test_no_packaged_judge_changes_without_a_new_version() -> None:
    """judges/checksums.txt has a line "name version hash" for every version of every packaged judge, also old ones."""
    versions: dict[tuple[str, str], str] = {}
    for line in (ROOT / "judges" / "checksums.txt").read_text().splitlines():
        name, version, digest = line.split()
        assert (name, version) not in versions, (
            f"judges/checksums.txt has {name} {version} twice: a version is never reused"
        )
        versions[name, version] = digest
    packaged = [load_judge(folder) for folder in resources.judges().values()]
    assert {judge.name for judge in packaged} >= {"helpful", "quality"}
    for judge in packaged:
        line = f"{judge.name} {judge.file.version} {judge.hash}"
        digest = versions.get((judge.name, judge.file.version))
        assert digest is not None, f"add this line to judges/checksums.txt:\n{line}"
        assert digest == judge.hash, (
            f"the text of judge {judge.name} has changed, but not its version. Raise version in "
            f"judges/{judge.name}/judge.toml, run this test again, and add the line that it prints to "
            "judges/checksums.txt. Keep the old lines."
        )


def test_the_version_test_detects_a_change(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The test above fails for a changed judge, and prints the line to add."""
    original = resources.judges()["helpful"]
    toml, prompt = (original / "judge.toml").read_text(), (original / "prompt.md").read_text()
    quality = resources.judges()["quality"]
    changed = write_judge_folder(tmp_path / "helpful", toml, prompt.replace("careful", "careless"))
    monkeypatch.setattr(resources, "judges", lambda: {"helpful": changed, "quality": quality})
    with pytest.raises(AssertionError, match="has changed, but not its version"):
        test_no_packaged_judge_changes_without_a_new_version()
    write_judge_folder(changed, toml.replace('version = "2"', 'version = "99"'), prompt.replace("careful", "careless"))
    with pytest.raises(AssertionError, match=f"helpful 99 {load_judge(changed).hash}"):
        test_no_packaged_judge_changes_without_a_new_version()


def test_packaged_judges_do_not_name_a_model() -> None:
    for folder in resources.judges().values():
        judge = load_judge(folder)
        assert judge.file.description
        assert "model" not in judge_file.JudgeFile.model_fields
        assert judge.system or judge.file.kind == "reward"
