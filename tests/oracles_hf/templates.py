"""Chat templates with what those of well-known families do: blocks, macros, namespaces, trimming, JSON, dates."""

CHATML = """\
{%- for message in messages %}
    {%- if loop.first and message.role != 'system' %}
        {{- '<|im_start|>system\\nYou help.<|im_end|>\\n' }}
    {%- endif %}
    {%- if message.role == 'assistant' %}
        {{- '<|im_start|>assistant\\n' }}
        {%- generation %}{{ message.content }}{{ '<|im_end|>' }}{%- endgeneration %}
        {{- '\\n' }}
    {%- else %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""

LLAMA = """\
{% if messages[0]['role'] == 'system' %}{% set loop_messages = messages[1:] %}{% set system = messages[0]['content'] %}
{% else %}{% set loop_messages = messages %}{% set system = '' %}{% endif %}
{% for message in loop_messages %}
{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate') }}{% endif %}
{% if message['role'] == 'user' %}{{ bos_token + '[INST] ' + (system + '\\n\\n' if loop.first and system else '') }}
{{- message['content'].strip() + ' [/INST]' }}
{% else %}{{ ' ' + message['content'] | trim + ' ' + eos_token }}{% endif %}
{% endfor %}
"""

TEMPLATES = {
    "macro": """\
{%- macro turn(role, content, last) -%}
<{{ role | upper }}{{ ' last' if last }}>
{{ content | trim | replace('&', 'and') }}
</{{ role }}>
{% endmacro -%}
{%- set state = namespace(count=0) -%}
{%- for message in messages -%}
{{ turn(message.role, message.content, loop.last) }}
{%- set state.count = state.count + 1 -%}
{%- endfor -%}
{{ state.count }} {{ messages | map(attribute='role') | join(',') }}{{ '<ASSISTANT>' if add_generation_prompt }}
""",
    "json": """\
{{ messages | tojson }}|{{ messages[0] | tojson(indent=2) }}|{{ {'a': '<é>'} | tojson(ensure_ascii=True) }}
{% for message in messages %}
    {% if message.role == 'system' %}{% continue %}{% endif %}
    {{ loop.index }}{{ message.content[:3] }}{{ message.get('name', 'none') }}
    {% if loop.index > 2 %}{% break %}{% endif %}
{% endfor %}
{{ tools is none }}{{ documents is defined }}{{ missing is defined }}{{ strftime_now('%%') }}{{ dict(a=1)['a'] }}
""",
    "generation": """\
{% for message in messages %}
{% if message.role == 'assistant' %}
A: {% generation %}{{ message.content | trim }}{{ eos_token }}{% endgeneration %}

{% else %}
{{ message.role }}: {{ message.content }}
{% endif %}
{% endfor %}
{{ 'A: ' if add_generation_prompt }}""",
}
