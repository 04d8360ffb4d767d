"""Chat templates for Mistral's tekken.json, which has none: a version of it is a way to chat.

Text and tools alone: who wrote a model may send a template along that has pictures or thoughts too.
"""

from collections.abc import Collection
from string import Template
from typing import Any

UNKNOWN_CHATS = "tekken_version"  # a key of tokenizer_config.json where there is no template
FIRST = ("v1", "v2", "v3")  # where the last user's turn begins with what the system says
CALLS = ("v11", "v13")  # where calls are not in JSON
RESULTS = ("v7", "v11")  # where results have the id of their call
KNOWN = (*FIRST, "v7", *CALLS)

# Turns of one role in a row are one. Contents are text, or a list of pieces of text.
TURNS = r"""
{%- macro read(content) %}
{%- if content is string %}{{ content }}{% elif content %}
{%- if content | rejectattr('type', 'equalto', 'text') | list %}
{{- raise_exception('only text can be in a message') }}{% endif %}
{{- content | map(attribute='text') | join('\n\n') }}{% endif %}
{%- endmacro %}
{%- set chat = namespace(turns=[], system=[], users=0) %}
{%- for message in messages %}
{%- set role, said = message['role'], read(message['content']) %}
{%- set calls = message['tool_calls'] or [] %}
{%- if role not in ('system', 'user', 'assistant', 'tool') %}
{{- raise_exception('a turn of ' + role + ' is not supported') }}{% endif %}
{%- if role == 'system' and $joins_system %}
{%- set chat.system = chat.system + [said] %}
{%- elif chat.turns and role in ('user', 'assistant') and chat.turns[-1].role == role %}
{%- set last = chat.turns[-1] %}
{%- set said = [last.said, said] | select | join('\n\n') %}
{%- set turn = {'role': role, 'said': said, 'calls': last.calls + calls} %}
{%- set chat.turns = chat.turns[:-1] + [turn] %}
{%- else %}
{%- set turn = {'role': role, 'said': said, 'calls': calls, 'id': message['tool_call_id']} %}
{%- set chat.turns = chat.turns + [turn] %}
{%- set chat.users = chat.users + (role == 'user') %}
{%- endif %}
{%- endfor %}"""
LISTED = r"""
{%- set listed = namespace(tools=[], users=0) %}
{%- for tool in tools or [] %}
{%- set one = tool['function'] or tool %}
{%- set one = {'name': one['name'], 'description': one['description'] or '',
               'parameters': one['parameters'] or {}} %}
{%- set listed.tools = listed.tools + [{'type': 'function', 'function': one}] %}
{%- endfor %}"""
SAID = r"""
{{- bos_token }}
{%- for turn in chat.turns %}
{%- if turn.role == 'system' %}{{ '[SYSTEM_PROMPT]' + turn.said + '[/SYSTEM_PROMPT]' }}
{%- elif turn.role == 'user' %}
{%- set listed.users = listed.users + 1 %}
{%- if listed.tools and listed.users == $tools_before %}
{{- '[AVAILABLE_TOOLS]' + (listed.tools | tojson) + '[/AVAILABLE_TOOLS]' }}{% endif %}
{%- set first = chat.system | select | join('\n\n') if listed.users == chat.users else '' %}
{{- '[INST]' + (first + '\n\n' if first else '') + turn.said + '[/INST]' }}
{%- elif turn.role == 'tool' %}{{ '[TOOL_RESULTS]' }}$result{{ '[/TOOL_RESULTS]' }}
{%- else %}{{ turn.said.rstrip(' ') }}
{%- set done = namespace(calls=[]) %}
{%- for call in turn.calls %}
{%- set given = call['function']['arguments'] %}
{%- set given = given if given is string else given | tojson %}
{%- set done.calls = done.calls + [$call] %}
{%- endfor %}
{%- if done.calls %}$made{% endif %}{{ eos_token }}
{%- endif %}
{%- endfor %}"""
# A call, and a turn's calls: first as a list in JSON, then, in newer versions, each by itself.
JSON_CALL = """'{"name": ' + call['function']['name'] | tojson + ', "arguments": ' + given
    + (', "id": ' + call['id'] | tojson if call['id'] else '') + '}'"""
JSON_CALLS = "{{ '[TOOL_CALLS][' + done.calls | join(', ') + ']' }}"
CALL = "'[TOOL_CALLS]' + call['function']['name'] + '[ARGS]' + given"
CALL_WITH_ID = CALL.replace("'[ARGS]'", "'[CALL_ID]' + call['id'] + '[ARGS]'")


def make_template(version: Any, specials: Collection[str]) -> str | None:
    """Make the Jinja template by which mistral-common renders chats of a tekken.json.

    Args:
        version: of the file.
        specials: its special tokens.

    Returns:
        The template; None if the version is not known, or what its chats need is not there.
    """
    needed = ["[INST]", "[/INST]", "[AVAILABLE_TOOLS]", "[TOOL_CALLS]", "[TOOL_RESULTS]"]
    needed += [] if version in FIRST else ["[SYSTEM_PROMPT]"]
    needed += ["[TOOL_CONTENT]"] if version in RESULTS else []
    needed += ["[ARGS]"] if version in CALLS else []
    if version not in KNOWN or not {*needed} <= {*specials}:
        return None
    call, made = JSON_CALL, JSON_CALLS
    if version in CALLS:
        call, made = CALL_WITH_ID if version == "v11" else CALL, "{{ done.calls | join }}"
    result = "{{ turn.said }}"
    if version in FIRST:
        result = "{{ {'content': turn.said, 'call_id': turn.id} | tojson }}"
    elif version in RESULTS:
        result = "{{ turn.id + '[TOOL_CONTENT]' + turn.said }}"
    template = Template(TURNS + LISTED + SAID).substitute(
        joins_system=str(version in FIRST).lower(),
        tools_before="1" if version == "v13" else "chat.users",
        result=result,
        call=call,
        made=made,
    )
    return template.strip()
