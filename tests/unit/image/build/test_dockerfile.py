from __future__ import annotations

import pytest

from ringfence.errors import ConfigError
from ringfence.image.build.dockerfile import parse_dockerfile
from ringfence.image.build.ignore import Ignore
from ringfence.image.build.words import expand, key_values, split_words


def test_continuations_comments_and_flags() -> None:
    found = parse_dockerfile(
        "# syntax=docker/dockerfile:1\n"
        "# a comment\n"
        "from --platform=linux/amd64 debian:12 AS base\n"
        "RUN a && \\\n"
        "  # in between\n"
        "\n"
        "  b\n"
        "COPY --chown=1:2 --from=base x y /z/\n",
    )
    assert [(i.name, i.line) for i in found] == [("FROM", 3), ("RUN", 4), ("COPY", 8)]
    assert found[0].flag("platform") == "linux/amd64"
    assert found[1].text == "a &&   b"
    assert [(f.name, f.value) for f in found[2].flags] == [("chown", "1:2"), ("from", "base")]
    assert found[2].text == "x y /z/"


def test_escape_directive() -> None:
    found = parse_dockerfile("# escape=`\nFROM a\nRUN one `\n two \\\n")
    assert found[1].text == "one  two \\"


def test_heredocs() -> None:
    found = parse_dockerfile(
        "FROM a\n"
        "RUN <<EOF cat > /x\n"
        "one $A\n"
        "# not a comment\n"
        "EOF\n"
        "COPY <<'A' <<-B /dir/\n"
        "raw\n"
        "A\n"
        "\ttabbed\n"
        "\tB\n"
        "RUN echo \"<<NOT\" '<<NOT' a<<<b\n",
    )
    assert found[1].heredocs[0].text == "one $A\n# not a comment\n"
    assert [(h.name, h.text, h.expand) for h in found[2].heredocs] == [
        ("A", "raw\n", False),
        ("B", "tabbed\n", True),
    ]
    assert found[3].heredocs == ()


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "no instructions"),
        ("# only a comment\n", "no instructions"),
        ("FROM a\nFETCH b\n", "line 2: there is no instruction 'FETCH'"),
        ("FROM a\nRUN\n", "RUN needs an argument"),
        ("FROM a\nRUN <<EOF\nx\n", "heredoc EOF has no end"),
        ("# escape=x\nFROM a\n", "escape character"),
    ],
)
def test_refusals(text: str, why: str) -> None:
    with pytest.raises(ConfigError, match=why):
        parse_dockerfile(text)


@pytest.mark.parametrize(
    ("text", "result"),
    [
        ("$A-${B}", "one-"),
        ("${B:-x $A}", "x one"),
        ("${A:+y}${B:+z}", "y"),
        ("${E-unset}", ""),
        ("${E:-empty}", "empty"),
        (r"\$A", "$A"),
        ("'$A'", "$A"),
        ('"$A b"', "one b"),
        ('"a\\"b"', 'a"b'),
        ("${P#*/}", "b/c.x"),
        ("${P##*/}", "c.x"),
        ("${P%/*}", "a/b"),
        ("${P%%/*}", "a"),
        ("$", "$"),
        ("a$1b", "a"),
    ],
)
def test_expansion(text: str, result: str) -> None:
    assert expand(text, {"A": "one", "E": "", "P": "a/b/c.x"}) == result


def test_expansion_refuses() -> None:
    for text in ("'a", '"a', "${A", "${A:?gone}", "${A^}"):
        with pytest.raises(ConfigError):
            expand(text, {})


def test_words_and_pairs() -> None:
    assert split_words(r"a 'b c' d\ e $X", {"X": "x y"}) == ["a", "b c", "d e", "x y"]
    assert key_values('A=1 B="two words" C=a\\ b', {}) == {"A": "1", "B": "two words", "C": "a b"}
    assert key_values("PATH /bin:$P rest", {"P": "/x"}) == {"PATH": "/bin:/x rest"}
    with pytest.raises(ConfigError):
        key_values("A", {})


@pytest.mark.parametrize(
    ("lines", "path", "out"),
    [
        (["*.log"], "a.log", True),
        (["*.log"], "d/a.log", False),
        (["**/*.log"], "d/e/a.log", True),
        (["**/*.log"], "a.log", True),
        (["node_modules"], "node_modules/x/y", True),
        (["/build/"], "build/x", True),
        (["*", "!src"], "src/a", False),
        (["*", "!src"], "other", True),
        (["*.md", "!README.md", "README.md"], "README.md", True),
        (["doc/[ab]?.txt"], "doc/a1.txt", True),
        (["doc/[^ab]?.txt"], "doc/a1.txt", False),
        (["# x", "", "  y  "], "y", True),
        (["a/../b"], "b", True),
        (["a/**"], "a/b/c", True),
        (["te+st"], "te+st", True),
    ],
)
def test_ignore(lines: list[str], path: str, *, out: bool) -> None:
    assert Ignore(lines).ignores(path) is out
