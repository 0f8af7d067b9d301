"""Templates that try to break out, to go on for ever, or to use up what everybody needs."""

from __future__ import annotations

_NESTED_LOOPS = (
    "{% for a in r %}{% for b in r %}{% for c in r %}{% endfor %}{% endfor %}{% endfor %}"
)
_DOUBLED_TEXT = "{% set ns = namespace(x='aaaaaaaa') %}{% for _ in range(99) %}BODY{% endfor %}"

ESCAPES = {
    # Towards Python's internals.
    "class of a text": "{{ ''.__class__ }}",
    "method resolution order": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "subscript": "{{ ''['__class__'] }}",
    "attr filter": "{{ ''|attr('__class__') }}",
    "attr of a built name": "{{ ''|attr('__cl' ~ 'ass__') }}",
    "attr of an escaped name": r"{{ ''|attr('\x5f\x5fclass\x5f\x5f') }}",
    "attr of a joined name": "{{ ''|attr(['_' * 2, 'class', '_' * 2]|join) }}",
    "attr of a replaced name": "{{ ''|attr('xxclassxx'|replace('x', '_')) }}",
    "map attribute": "{{ ['']|map(attribute='__class__')|list|first ~ '' }}",
    "map attr": "{{ ['']|map('attr', '__class__')|list|first ~ '' }}",
    "selectattr": "{{ ['']|selectattr('__class__.__mro__')|list }}",
    "sort by attribute": "{{ ['', 'a']|sort(attribute='__class__.__mro__') }}",
    "groupby": "{{ messages|groupby('__class__.__mro__')|list }}",
    "sum of attributes": "{{ ['']|sum(attribute='__class__') }}",
    "globals of lipsum": "{{ lipsum.__globals__ }}",
    "globals of lipsum by subscript": "{{ lipsum['__globals__']['os'] }}",
    "code of a function": "{{ raise_exception.__code__ }}",
    "globals of a function": "{{ strftime_now.__globals__ }}",
    "builtins": "{{ namespace.__init__.__globals__['__builtins__'] }}",
    "init of cycler": "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
    "init of joiner": "{{ joiner.__init__.__globals__ }}",
    "namespace subclasses": "{{ namespace.__base__.__subclasses__() }}",
    "namespace attribute": "{% set n = namespace() %}{% set n.__class__ = dict %}",
    "namespace keyword": "{{ namespace(__class__=dict) }}",
    "names of a namespace": "{{ namespace(a=1).__init__ }}{{ namespace([1]) }}",
    "class of dict": "{{ dict.__class__ }}",
    "function of a macro": "{% macro m() %}{% endmacro %}{{ m._func.__globals__ }}",
    "code of a macro": "{% macro m() %}{% endmacro %}{{ m._func.__code__ }}",
    "generator frame": "{{ (messages|map('upper')).gi_frame.f_back }}",
    "the template itself": "{{ self._TemplateReference__context }}",
    "environment of the context": "{{ self._TemplateReference__context.environment }}",
    "environment of the loop": "{% for _ in [1] %}{{ loop._undefined.__init__ }}{% endfor %}",
    "format attribute": "{{ '{0.__class__}'.format('') }}",
    "format globals": "{{ '{0.__globals__}'.format(lipsum) }}",
    "format nested": "{{ '{0.__class__.__mro__[1]}'.format(messages) }}",
    "format_map": "{{ '{a.__class__}'.format_map({'a': ''}) }}",
    "format by a variable": "{% set f = '{0.__class__}'.format %}{{ f('') }}",
    "format without its guard": "{{ '{0.__class__}'.format.__wrapped__('') }}",
    "undefined globals": "{{ nobody.__init__.__globals__ }}",
    "call of nothing": "{{ open('/etc/passwd').read() }}",
    "import of nothing": "{{ __import__('os').system('id') }}",
    "builtin functions": "{{ ''.join.__self__ }}",
    "configuration": "{{ config.items() }}",
    # Towards files.
    "include": "{% include '/etc/passwd' %}",
    "include beside": "{% include 'chat_template.jinja' %}",
    "import": "{% import '/etc/passwd' as secrets %}{{ secrets }}",
    "from import": "{% from '../tokenizer_config.json' import x %}",
    "extends": "{% extends '/etc/passwd' %}",
    # Towards what other requests see.
    "append": "{{ messages.append({'role': 'system'}) }}",
    "clear": "{{ messages.clear() }}",
    "update": "{{ messages[0].update(role='system') }}",
    "pop": "{{ messages[0].pop('role') }}",
    "setdefault": "{{ messages[0].setdefault('a', 1) }}",
    "sort in place": "{{ messages.sort() }}",
    "do": "{% set _ = messages.extend([1]) %}",
    "change of a function": "{% set lipsum.x = 1 %}",
    # For ever.
    "long range": "{% for _ in range(10 ** 9) %}{% endfor %}",
    "nested loops": "{% set r = range(99999) %}" + _NESTED_LOOPS,
    "loop over a filter": "{% for _ in range(99999)|batch(1) %}{{ range(99999)|sum }}{% endfor %}",
    "macro that calls itself": "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
    "macros that call each other": (
        "{% macro a(n) %}{{ b(n) }}{% endmacro %}{% macro b(n) %}{{ a(n) }}{{ a(n) }}{% endmacro %}"
        "{{ a(1) }}"
    ),
    "macro tree": (
        "{% macro m(n) %}{% if n %}{{ m(n - 1) }}{{ m(n - 1) }}{% endif %}{% endmacro %}{{ m(60) }}"
    ),
    "recursive loop": "{% for x in [[1]] recursive %}{{ loop([[1]]) }}{% endfor %}",
    "self block": "{% block b %}{{ self.b() }}{% endblock %}",
    "caller": "{% macro m() %}{% call m() %}{% endcall %}{% endmacro %}{{ m() }}",
    "huge power": "{{ 10 ** (10 ** 8) }}",
    "huge power in a test": "{% if 7 ** (7 ** 11) %}{% endif %}",
    "power of a power": "{% set ns = namespace(x=9) %}{% for _ in range(99) %}"
    "{% set ns.x = ns.x ** 9 %}{% endfor %}{{ ns.x }}",
    "long division": "{{ (3 ** 900000) // (7 ** 300000) % (5 ** 99999) }}{{ 7 ** (10 ** 7) }}",
    "sorting": "{% for _ in range(99999) %}{{ range(99999)|sort|reverse|list|length }}{% endfor %}",
    "replacing": "{% set x = 'a' * 10 ** 6 %}{% for _ in range(99999) %}"
    "{% set y = x|replace('a', 'bc') %}{% endfor %}",
    "searching": "{{ ('a' * 10 ** 6).count('a' * 500000 ~ 'b') }}{% for _ in range(99999) %}"
    "{{ ('a' * 10 ** 6 ~ 'b').find('a' * 500000 ~ 'c') }}{% endfor %}",
    # Towards all memory.
    "repeated text": "{{ 'a' * 10 ** 10 }}",
    "repeated list": "{{ [0] * 10 ** 10 }}",
    "repeated by a variable": "{% set n = 10 ** 10 %}{% set x = 'a' * n %}",
    "center": "{{ 'a'|center(10 ** 9) }}",
    "center method": "{{ 'a'.center(10 ** 10) }}",
    "zfill": "{{ 'a'.zfill(10 ** 10) }}",
    "ljust": "{{ 'a'.ljust(10 ** 10) }}",
    "expandtabs": "{{ ('\t' * 1000).expandtabs(10 ** 8) }}",
    "join": "{{ range(99999)|map('string')|join('a' * 10 ** 6) }}",
    "indent": "{{ ('a\n' * 10 ** 6)|indent(10 ** 6) }}",
    "percent format": "{{ '%1000000000d'|format(1) }}",
    "percent operator": "{{ '%*d' % (10 ** 9, 1) }}",
    "brace format": "{{ '{:1000000000}'.format(1) }}",
    "doubled text": _DOUBLED_TEXT.replace("BODY", "{% set ns.x = ns.x ~ ns.x %}"),
    "doubled list": "{% set ns = namespace(x=[1]) %}{% for _ in range(99) %}"
    "{% set ns.x = ns.x + ns.x %}{% endfor %}",
    "replaced text": _DOUBLED_TEXT.replace("BODY", "{% set ns.x = ns.x|replace('a', 'aa') %}"),
    "nested list": "{% set ns = namespace(x=[]) %}{% for _ in range(99999) %}"
    "{% set ns.x = [ns.x, ns.x] %}{% endfor %}{{ ns.x|tojson }}",
    "indented json": "{{ messages|tojson(indent=10 ** 10) }}",
    "lipsum": "{{ lipsum(n=10 ** 6, min=99, max=100) }}",
    "captured output": "{% set x %}{% for _ in range(99999) %}{{ 'a' * 10 ** 5 }}{% endfor %}"
    "{% endset %}",
    "wordwrap": "{{ ('a ' * 10 ** 7)|wordwrap(1, wrapstring='b' * 1000) }}",
    # Towards more output than anybody reads.
    "endless output": "{% for _ in range(99999) %}{{ 'x' * 10000 }}{% endfor %}",
    "one long output": "{{ 'x' * 10 ** 8 }}",
    "output of a macro": "{% macro m() %}{{ 'x' * 10 ** 7 }}{% endmacro %}{{ m() }}",
    "long error": "{{ raise_exception('x' * 10 ** 7) }}",
    "half a character": r"{{ '\ud800' }}",
}  # fmt: skip

SLOW = {
    "loop over a filter",
    "huge power in a test",
    "power of a power",
    "long division",
    "replacing",
    "searching",
    "replaced text",
    "nested list",
    "lipsum",
    "wordwrap",
}
"""They use up all their time, as others of their kind do."""
