"""Prepared tables become token ids."""

from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from plumbline.data.rows import encode_rows, read_rows
from plumbline.data.tokenize import ChatEncoder

AsPrompt = Callable[[str], str]


def write(folder: Path, **columns: list[object]) -> Path:
    path = folder / "rows.parquet"
    pq.write_table(pa.table(columns), path)
    return path


def test_demonstrations(tmp_path: Path, encoder: ChatEncoder, as_prompt: AsPrompt) -> None:
    prompts = [as_prompt("Hi"), as_prompt("fold it")]
    path = write(tmp_path, prompt=prompts, response=["Yes", "No"], prompt_id=["a", "b"])
    rows = encode_rows(read_rows(path), encoder)
    assert [row["prompt"] for row in rows] == encoder.prompts(prompts)
    assert [row["response"] for row in rows] == encoder.responses(["Yes", "No"])
    assert set(rows[0]) == {"prompt", "response", "prompt_id"}


def test_preferences_keep_what_the_data_says_of_a_pair(
    tmp_path: Path, encoder: ChatEncoder, as_prompt: AsPrompt
) -> None:
    path = write(
        tmp_path,
        prompt=[as_prompt("Hi")] * 2,
        chosen=["Yes", "Sure"],
        rejected=["No", "Never"],
        clean=[True, False],
        margin=[0.5, 1.0],
        prompt_id=["a", "a"],
    )
    rows = encode_rows(read_rows(path), encoder)
    assert [row["chosen"] for row in rows] == encoder.responses(["Yes", "Sure"])
    assert [row["rejected"] for row in rows] == encoder.responses(["No", "Never"])
    assert [row["clean"] for row in rows] == [True, False]
    assert [row["margin"] for row in rows] == [0.5, 1.0]


def test_a_file_that_changes_is_read_anew(
    tmp_path: Path, encoder: ChatEncoder, as_prompt: AsPrompt
) -> None:
    for text in ("first", "second"):
        path = write(tmp_path, prompt=[as_prompt(text)])
        assert read_rows(path)["prompt"][0] == as_prompt(text)
        assert (
            encode_rows(read_rows(path), encoder)[0]["prompt"]
            == (encoder.prompts([as_prompt(text)])[0])
        )
