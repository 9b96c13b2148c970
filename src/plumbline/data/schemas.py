"""The rules that rows must keep, as pandera schemas over canonical frames.

A rule on one value is a check on its column. A rule on several values, rows or tables is found
first (`findings`), as a column that is null where the rule is kept and otherwise names the
evidence (the other row); its check is then that the column is null. So pandera reports one failure
a row with its evidence in hand, however many columns the frame has.
"""

from collections.abc import Callable

import pandas as pd
import pandera.pandas as pa
import pyarrow as arrow
import pyarrow.compute as pc

from plumbline.data.findings import FINDINGS
from plumbline.data.formats import TABLES
from plumbline.data.values import conversation

# C0 and C1 controls and DEL, without tab and line feed.
CONTROL_CHARACTERS = r"[\x00-\x08\x0B-\x1F\x7F-\x9F]"
# The same in JSON text, which escapes C0 alone; the backslash of an escape is not escaped itself.
CONTROL_CHARACTERS_IN_JSON = r"[^\\](\\\\)*\\([bfr]|u00[01])|[\x7F-\x9F]"
RESPONSES = ("response", "chosen", "rejected")

# Of each finding the field it is reported under and the reason, which `case` completes.
_REASONS = {
    "same_pair": ("chosen", "chosen equals rejected"),
    "reversed_of": ("chosen", "same pair in both orders (see row {case})"),
    "duplicate_of": ("prompt", "duplicate of row {case}"),
    "leaks_to": ("prompt", "prompt is in train and in test (see {case})"),
}
_TOKENS = "_tokens"

_Rule = Callable[[pd.Series], pd.Series]


def schema_of(
    table: str, max_prompt_tokens: int | None = None, max_response_tokens: int | None = None
) -> pa.DataFrameSchema:
    """The rules of a table with findings; the length rules need `<field>_tokens` columns.

    Null is allowed everywhere: a null field was reported by `formats.read_batches`, and saying
    "blank text" of a field that holds a number would send the user the wrong way.
    """
    columns = {"row": pa.Column("int64")}
    for field in TABLES[table]:
        if field == "label":
            columns[field] = pa.Column("boolean", nullable=True)
            continue
        columns[field] = (
            _text(_has_blank_turn, _has_control_turn)
            if field == "prompt"
            else _text(_is_blank, _has_control)
        )
        limit = max_prompt_tokens if field == "prompt" else max_response_tokens
        if limit is not None:
            columns[field + _TOKENS] = _tokens(field, limit)
    columns["duplicate_of"] = _finding("duplicate_of")
    columns["leaks_to"] = _finding("leaks_to")
    if table == "preferences":
        columns["margin"] = _margin()
        columns["clean"] = pa.Column("boolean", nullable=True, required=False)
        columns["same_pair"] = _finding("same_pair")
        columns["reversed_of"] = _finding("reversed_of")
    return pa.DataFrameSchema(columns)


def broken_rules(frame: pd.DataFrame, schema: pa.DataFrameSchema) -> pd.DataFrame:
    """The rows that break a rule: `index` (into the frame), `field`, `reason`."""
    try:
        schema.validate(frame, lazy=True)
    except pa.errors.SchemaErrors as errors:
        cases = errors.failure_cases
    else:
        return pd.DataFrame({"index": [], "field": [], "reason": []})
    if (faults := cases[cases["index"].isna()]).size:
        # Not the user's fault: the frame did not come from `read_batches`.
        raise TypeError(f"expected canonical rows, got {faults.to_dict('records')}")
    fields = [
        _REASONS[column][0] if column in _REASONS else column.removesuffix(_TOKENS)
        for column in cases["column"]
    ]
    reasons = [
        check.replace("{case}", str(case))
        for check, case in zip(cases["check"], cases["failure_case"], strict=True)
    ]
    return pd.DataFrame({"index": cases["index"], "field": fields, "reason": reasons})


# Rules on one value.


def _text(has_blank: _Rule, has_control: _Rule) -> pa.Column:
    checks = [
        pa.Check(lambda texts: ~has_blank(texts), error="blank text"),
        pa.Check(lambda texts: ~has_control(texts), error="control character"),
    ]
    return pa.Column(str, checks, nullable=True)


def _tokens(field: str, limit: int) -> pa.Column:
    reason = f"{field} has {{case}} tokens, the limit is {limit}"
    return pa.Column("Int64", pa.Check.le(limit, error=reason), nullable=True)


def _margin() -> pa.Column:
    finite = pa.Check(
        lambda margin: (margin >= 0) & (margin < float("inf")),
        error="expected a finite margin of at least 0",
    )
    return pa.Column("float64", finite, nullable=True, required=False)


def _finding(name: str) -> pa.Column:
    check = pa.Check(lambda found: found.isna(), error=_REASONS[name][1])
    return pa.Column(FINDINGS[name], check, nullable=True)


def _is_blank(texts: pd.Series) -> pd.Series:
    return texts.str.strip() == ""


def _has_control(texts: pd.Series) -> pd.Series:
    return _matches(texts, CONTROL_CHARACTERS)


def _has_blank_turn(prompts: pd.Series) -> pd.Series:
    # What begins with a visible character of ASCII is not blank, which settles most prompts.
    suspects = _matches(prompts, r'"content": ?"[^!#-\[\]-~]')
    blank = [index for index, prompt in prompts[suspects].items() if _is_blank_in(prompt)]
    return pd.Series(prompts.index.isin(blank), index=prompts.index)


def _is_blank_in(prompt: str) -> bool:
    return not all(turn["content"].strip() for turn in conversation(prompt))


def _has_control_turn(prompts: pd.Series) -> pd.Series:
    return _matches(prompts, CONTROL_CHARACTERS_IN_JSON)


def _matches(texts: pd.Series, pattern: str) -> pd.Series:
    found = pc.match_substring_regex(arrow.array(texts, arrow.large_string()), pattern)
    return pd.Series(found.fill_null(False).to_numpy(zero_copy_only=False), index=texts.index)
