"""A record of which only the question counts."""

import json
import re

import pytest

from moka_pl.data.formats.instruction import parse_prompt
from moka_pl.errors import DataError

ASKED = [{"role": "user", "content": "Hi"}]
SAID = [*ASKED, {"role": "assistant", "content": "Hello"}]


@pytest.mark.parametrize(
    ("record", "instruction", "context", "roles"),
    [
        ({"prompt": "Hi"}, "Hi", "", []),
        ({"prompt": "Hi", "completion": "Hello"}, "Hi", "", []),
        ({"prompt": "Hi", "response": "Hello"}, "Hi", "", []),
        ({"instruction": "Add", "input": "2, 3"}, "Add", "2, 3", []),
        ({"instruction": "Add", "input": "2, 3", "output": "5"}, "Add", "2, 3", []),
        ({"instruction": "Add", "context": "2, 3"}, "Add", "2, 3", []),
        ({"inputs": "Hi"}, "Hi", "", []),
        ({"prompt": ASKED}, "", "", ["user"]),
        ({"prompt": ASKED, "completion": SAID[1:]}, "", "", ["user"]),
        ({"messages": ASKED}, "", "", ["user"]),
        ({"messages": SAID}, "", "", ["user"]),
        ({"messages": [*SAID, *ASKED]}, "", "", ["user", "assistant", "user"]),
        ({"messages": json.dumps(SAID)}, "", "", ["user"]),
        ({"conversations": [{"from": "human", "value": "Hi"}]}, "", "", ["user"]),
        ({"instruction": "Hi", "system": "Be brief."}, "Hi", "", ["system", "user"]),
    ],
)
def test_a_prompt_needs_no_answer(record, instruction, context, roles):
    row = parse_prompt(record)
    assert (row["instruction"], row["input"], row["output"]) == (instruction, context, "")
    assert [message["role"] for message in row["messages"]] == roles


def test_a_prompt_keeps_the_further_fields_of_what_is_asked():
    call = {"role": "assistant", "content": "", "tool_calls": [{"name": "f", "arguments": {}}]}
    reply = {"role": "tool", "content": "3", "name": "f"}
    row = parse_prompt({"messages": [*ASKED, call, reply, SAID[1]], "tools": [{"name": "f"}]})
    more = json.loads(row["more"])
    assert [sorted(fields) for fields in more["messages"]] == [[], ["tool_calls"], ["name"]]
    assert len(row["messages"]) == 3
    assert more["options"]["tools"]


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"question": "Hi"}, "nothing is asked in these fields: question. Give prompt, instruction"),
        ({"prompt": ""}, "nothing is asked in these fields: prompt"),
        ({"prompt": " \n"}, "nothing is asked; give a text"),
        ({"messages": SAID[1:]}, "nothing is asked; give a text"),
        ({"prompt": 3}, "field 'prompt' must be text, found int 3"),
        ({"messages": "Hi"}, "field 'messages' must be a list of messages"),
    ],
)
def test_a_prompt_that_asks_nothing(record, message):
    with pytest.raises(DataError, match=re.escape(message)):
        parse_prompt(record)
