# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

"""Texts that would do something where they are not escaped, and names that would lead elsewhere."""

TEXTS = [
    "<script>document.title='evil'</script>",
    "</script><script>document.title='evil'</script>",
    "</SCRIPT ><img src=x onerror=document.title='evil'>",
    '"><img src=x onerror="document.title=\'evil\'">',
    "' onmouseover='document.title=1' x='",
    "<!-- <script> --!> <![CDATA[x]]>",
    "<svg/onload=document.title='evil'>",
    "<iframe srcdoc='<script>parent.document.title=1</script>'>",
    "</style></title></textarea></noscript><b>",
    "javascript:alert(1)",
    "[link](javascript:alert(1))",
    "![picture](https://127.0.0.1:9/x.png)",
    "<https://127.0.0.1:9/>",
    "https://127.0.0.1:9/ www.example.com @everyone #1",
    "| a | b |\n|---|---|\n| c | d |",
    "a | b \\| c",
    "`code` ``` \n```\n# heading\n```",
    "---\nlicense: mit\n---",
    "# heading\n\n- list\n\n1. one\n\n> quote",
    "**bold** __bold__ ~~gone~~ *x* _y_",
    "{{7*7}} {% for x in y %} {# #} ${7*7} <%= 7 %>",
    "&lt;script&gt; &#60;b&#62; &amp;",
    "$\\frac{1}{2}$ \\(x\\) $$y$$ \\end{document}",
    "\u202eevil\u202c \u2066x\u2069 \u200b",
    "=cmd|' /C calc'!A0",
    "\\u003cscript\\u003e \u2028 \u2029",
    "a\x00b\x1b[31m\x07",
    "\ud83d\ude00".encode("utf-16", "surrogatepass").decode("utf-16") * 50,
    "x" * 5_000,
    "[x]: https://127.0.0.1:9/\n[x]",
    "<details open ontoggle=document.title=1>",
]
# Names that lead to another folder, or to none
NAMES = ["../evil", "..", ".", "", "a/../../evil", "/tmp/evil", "..\\evil", "a\\b", "C:evil", "C:\\evil", "\\\\host\\evil", "a/b",
         "a\x00b", "a\nb", "~/evil", "~", "%2e%2e/evil", "x" * 300, "\u202eevil", "../" * 30 + "tmp/evil", "evil/", "./evil",
         "-rf", ".hidden", "a b", "é", "$(touch evil)", "`touch evil`", "a;b", "a|b", "*", "?"]  # fmt: skip
