"""The code of docs/library.md, run word for word, block by block, in one interpreter."""

import re
from pathlib import Path

import pytest

PAGE = Path(__file__).parents[1] / "docs/library.md"


def test_the_page_s_code_runs(capsys: pytest.CaptureFixture[str]) -> None:
    blocks = re.findall(r"^```python\n(.*?)^```$", PAGE.read_text(), re.MULTILINE | re.DOTALL)
    assert len(blocks) >= 6
    names: dict[str, object] = {"__name__": "library"}
    for number, block in enumerate(blocks, 1):
        exec(compile(block, f"{PAGE}, block {number}", "exec"), names)
    _, recall, shares = capsys.readouterr().out.splitlines()
    assert float(recall) > 0.7  # 8 of some 29 items survive: chance is about 0.34
    assert shares == "tensor([[1., 0., 0., 0.]])"
