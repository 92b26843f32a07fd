"""Values that nobody should trust: texts, and JSON as it stands in a file."""

TEXTS = {
    "empty": "", "space": " \t\n", "NUL": "a\0b", "escape": "\x1b[2J\x1b]0;title\x07", "markup": "[bold red]x[/] <script>alert(1)</script>",
    "up": "../../../etc/passwd", "absolute": "/etc/passwd", "windows": "C:\\Windows\\win.ini", "device": "/dev/zero", "long": "x" * 100_000,
    "many lines": "\n" * 5_000, "line separator": "a\u2028b\u0085c", "right to left": "\u202egnp.lwo", "combining": "e" + "\u0301" * 5_000,
    "emoji": "\U0001f989" * 500, "percent": "%s%n{0}{prompt}", "number": "1e999", "nan": "nan", "json": '{"a": [1, 2, {"b": null}]}',
    "broken json": '{"a": ', "deep json": "[" * 50_000, "long number": "9" * 5_000, "data": "data:image/png;base64,AAAA", "comma": ",,,:,:,",
    "quotes": '"\\"\\\\"', "tag": "<lora:owl:1><lora::><lora:owl:nan:x:y>", "brackets": "(((((((((a:1.1)" * 500, "a tilde": "~root/x",
}  # fmt: skip

# What stands where a value belongs. BAD: no reader of JSON may take the whole text.
BAD = {
    "NaN": b"NaN", "infinity": b"-Infinity", "huge float": b"1e400", "5,000 digits": b"9" * 5_000, "negative digits": b"-" + b"1" * 5_000,
    "deep lists": b"[" * 5_000 + b"]" * 5_000, "deep objects": b'{"a":' * 5_000 + b"1" + b"}" * 5_000, "only just too deep": b"[" * 65 + b"]" * 65,
    "unclosed": b"[" * 50_000, "key twice": b'{"a": 1, "a": 2}', "not UTF-8": b'"\xff\xfe"', "half a sequence": b'"\xe2\x82"', "raw NUL": b'"a\0b"',
    "raw newline": b'"a\nb"', "empty": b"", "word": b"undefined", "single quotes": b"'a'", "comment": b"/* a */ 1", "trailing comma": b"[1,]",
    "hexadecimal": b"0x10", "leading zero": b"01", "plus": b"+1", "overlong": b'"\xc0\xaf"', "unclosed text": b'"' + b'\\"' * 20_000,
    "million lists": b"[" + b"[]," * 1_100_000 + b"[]]", "surrogate in UTF-8": b'"\xed\xa0\xbd"',
}  # fmt: skip
ODD = {"escaped NUL": b'"a\\u0000b"', "half a letter": b'"\\ud83d"'}  # JSON all the same: kept where nothing is named by it
ODDLY_TYPED = {
    "null": b"null", "true": b"true", "zero": b"0", "minus one": b"-1", "half": b"0.5", "large": b"1e308", "tiny": b"1e-320", "300 digits": b"9" * 300,
    "2**63": b"9223372036854775808", "2**64": b"18446744073709551616", "list": b"[]", "object": b"{}", "nested": b'{"a": [1, "b", {"c": null}]}',
    "numbers": b"[1, 2, 3, 4, 5]", "texts": b'["a", "", "b"]', "thousand": b"[" + b"0," * 999 + b"0]", "nulls": b"[null, null]",
}  # fmt: skip
