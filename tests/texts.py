"""Texts on which tokenizers fall apart: `TEXTS`, at least 200 of them, all different and none of them empty.

Written out where a case has a story, generated where it is one rule over many characters. No text holds U+0000:
llama.cpp takes lengths, but a tokenizer file cannot be asked about it in every library.
"""

from __future__ import annotations

import unicodedata

# One text a line; \n, \t and \r in it stand for themselves as in a string.
LINES = r"""Hello world
 Hello world
  Hello  world
Hello, y'all! How are you 😁 ?我想在apple工作1314151天～
The quick brown fox jumps over the lazy dog.
ied 4 ½ months
nØrmal café naïve façade Ærøskøbing Łódź
w048 7tuijk dsdfhu
Führer Straße GROẞ ﬁne ﬂow
Antidisestablishmentarianism and pneumonoultramicroscopicsilicovolcanoconiosis
Donaudampfschifffahrtselektrizitätenhauptbetriebswerkbauunterbeamtengesellschaft
http://user:pass@example.com:8080/a/b.html?q=1&r=%20#frag
name.surname+tag@mail.example.co.uk
C:\Windows\System32\drivers\etc
3.14159e-10 0x7fff_ffff 1,234,567.89 $5.00 50% ±2 №7 §12
--- *** === ___ ... !!! ??? ... -- --> <-- <=> && || ??= ::
( [ { < « " ' ` ' " » > } ] )
“Curly” ‘quotes’ – en — em … ‹single› „low“
[INST] What is your favourite condiment? [/INST]
<s>[INST] What is your favourite condiment? [/INST]
<s> [INST] Hi [/INST] Hello!</s> [INST] And again [/INST]
<s>[INST] <<SYS>>\nBe brief.\n<</SYS>>\n\nHi [/INST]
<|im_start|>system\nYou are helpful.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n
<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|>
<bos><start_of_turn>user\nHi<end_of_turn>\n<start_of_turn>model\n
<|user|>\nHi<|end|>\n<|assistant|>\nHello<|end|>
<|endoftext|>between<|endoftext|><|endoftext|>
 <|endoftext|> 
</s>a</s> b </s>\tc</s>\n\nd
<unk><s></s><pad><0x0A><0xFF>[PAD][UNK][CLS]
<s<s>s></s</s>>
<|fim_prefix|>def f():<|fim_suffix|>    return 1<|fim_middle|>
<|im_end|<|im_end|>|im_end|>
< s > < / s > <|im_ start|>
▁ ▁▁ a▁b ▁Hello ▁▁▁
Ġ ĠHello Ċ ĉ Ģ Ń
Hi 🤗 🙂🙂 🙃 👋🏽 👨‍👩‍👧‍👦 🏳️‍🌈 🇩🇪🇫🇷 1️⃣ ❤️ ☺️ 🧑🏿‍💻
🚀 (normal) 😶‍🌫️ (multiple emojis concatenated) ✅ 🦙🦙 3 33 333 3333 33333 🦙 😵‍💫 🫠🫡🩷
我们是中国人，我爱北京天安门。今天天气怎么样？
今日は良い天気ですね。カタカナ ﾊﾝｶｸ 漢字かな交じり文「括弧」～
대한민국 만세! 안녕하세요, 반갑습니다. ㄱㄴㄷ
السلام عليكم ورحمة الله وبركاته، كيف حالك؟
مُحَمَّد قَالَ: ١٢٣ ۴۵۶ لا إله
שלום עולם! בְּרֵאשִׁית בָּרָא
नमस्ते दुनिया, हिन्दी में लिखा है।
বাংলা ভাষা தமிழ் தெலுగు ಕನ್ನಡ മലയാളം ગુજરાતી ਪੰਜਾਬੀ සිංහල
สวัสดีครับ ประเทศไทย ภาษาไทยไม่มีช่องว่าง ๑๒๓
ខ្មែរ ភាសាខ្មែរ ລາວ မြန်မာ བོད་སྐད་ ᠮᠣᠩᠭᠣᠯ
Привет, мир! Ёлка ёж ЩУКА объём д'Артаньян
Ελληνικά: Καλημέρα κόσμε, ΑΒΓ αβγ ς ΐ
Հայերեն ქართული ᲥᲐᲠᲗᲣᲚᲘ ამჰარული አማርኛ Ꮳꮃꭹ
Tiếng Việt: Cô gái đi chợ mua bưởi, ổi và dưa hấu. Nguyễn Đình Thi
Türkçe: İstanbul ILIK ığdır şöğüş
Polski: zażółć gęślą jaźń ZAŻÓŁĆ
Icelandic: Þórður sagði að ðetta væri ǅ ǆ Ǆ
𝕳𝖊𝖑𝖑𝖔 𝓦𝓸𝓻𝓵𝓭 𝟙𝟚𝟛 Ⅻ ⅷ ① ⑳ ㊿ ㋿
𐍈𐌰𐌹𐌿𐍂 𓀀𓁐 𒀀𒁁 𐎠𐎼 𠀀𠮷野家 🀄︎
ÅÅÅ é é ñ ñ q̣̇ Z͑ͫ̓ͪ̂ͫ̽͏̴̙̤̞͉͚̯̞̠͍A̴̵̜̰͔ͫ͗͢L̠ͨͧͩ͘G̴̻͈͍͔̹̑͗̎̅͛́Ǫ̵̹̻̝̳͂̌̌͘!
I'm you're he's they'll we've she'd can't won't
I'M YOU'RE HE'S THEY'LL WE'VE SHE'D CAN'T WON'T
I'm You'Re hE'S they'Ll We'vE she'D 'twas o'clock rock'n'roll ''s '' 'S'
I’m you’re he’s they’ll — l’été aujourd’hui qu'il d'accord
's't're've'm'll'd 'S'T'RE'VE'M'LL'D 'x'y'z 'ſ 'K 'll'l
'''''''```````""......!!!!!!?????? I've been 'told he's there
def f(x):\n    if x > 0:\n        return x ** 2  # squared\n\treturn None\n
for (int i = 0; i < n; ++i) { a[i] += b[i] * c[i]; }\r\n// done\r\n
SELECT * FROM t WHERE a='x' AND b IN (1,22,333,4444);
<div class="a-b c_d"><p>&nbsp;&amp;</p></div><!-- x -->
{"key": [1, 2.5, -3e8, null, true], "k\u00e9": "v\n"}
#include <stdio.h>\nint main(void){puts("hi\n");return 0;}
$ ls -la | grep '^d' > /dev/null 2>&1 && echo $? ${HOME}
\begin{align} \alpha_i &= \sum_{j=1}^{n} x_{ij}^2 \\ \end{align}
fn main() { let x: Vec<&'static str> = vec!["a"; 3]; println!("{x:?}") }
a_b_c snake_case camelCase PascalCase SCREAMING_CASE kebab-case x1y2z3 HTMLParser iPhone15Pro
CamelCaseWORDAndLOWERcaseÉCOLEécoleПРИВЕТприветΑΒΓαβγ
aA AA aa Aa ÀÀ àà Àà àÀ éA Éa ŁódźŁÓDŹ"""

PLAIN = [line.replace(r"\n", "\n").replace(r"\t", "\t").replace(r"\r", "\r") for line in LINES.split("\n")]

WHITE = [
    *(" " * n for n in (1, 2, 3, 4, 5, 7, 8, 15, 16, 17, 31, 32, 33, 64, 100)),
    *(" " * n + "x" for n in (1, 2, 3, 4, 8, 17)),
    *("x" + " " * n for n in (1, 2, 3, 4, 8, 17)),
    *("a" + " " * n + "b" for n in (2, 3, 4, 5, 16, 17)),
    *("\t" * n for n in (1, 2, 3, 4, 9)),
    *("\n" * n for n in (1, 2, 3, 4, 5, 30, 31, 32, 40)),
    *("a" + "\n" * n + "b" for n in (1, 2, 3, 4)),
    *("\r\n" * n for n in (1, 2, 3)),
    *("\r", "a\rb", "a\r\nb", "a\r\n\r\nb", "a \r\n b", "a\n\rb", "\r\r\n\n"),
    *(" \n", "\n ", " \n \n ", "\t\n", "\n\t", " \t \t ", "\t \t", "a \tb", "a\t b", "a \n", "a\n  b\n    c\n"),
    *("  \n\n  \t\t\n x  ", "a  \n\n\n  b", "1 \n 2", "! \n !", "!\n!", "!\n\n!\r\n", "...\n", "x.\n\ny"),
    *("?! \n\n\t?!", "\n?"),
    *("\n=", " = ", "  = =  ", " \u00a0 ", "a\u00a0b", "a\u3000b", "\u2003\u2009x", "\u200bx\u200b", "a\u2028b\u2029c"),
    *("a\u0085b", "\u0085", "x\x0by\x0cz", "\ufeffbom", "a\u00adb", "\u1680ogham\u1680", "a \u00a0 b", " \u3000\n"),
]

CONTROLS = [
    *("\x01", "a\x01b", "\x02\x03\x04", "\x7f", "\x1b[31mred\x1b[0m", "\x08\x08", "a\x1fb\x1e", "\x80\x9f"),
    *("\x011\x012", "1\x012"),
    *("\ufffd", "a\ufffd\ufffdb", "\uffff\ufffe", "\ue000\uf8ff", "\U000f0000", "\U0010ffff", "\u0378\u0e5c", "\ud7ff"),
    *("\u200e\u200f\u202a\u202c", "\u2060\u2061", "a\u0301", "\u0301", " \u0301 ", "\u20dd", "e\u0301\u0302\u0303"),
]

DIGITS = [
    *("1", "12", "123", "1234", "12345", "123456", "1234567", "12345678901234567890", "0001", "1 2 3", "1  22   333"),
    *("x1", "1x", "1a2b3c", "v1.2.3-rc4", "a1234567b", "1,000,000", "3.14", "-1", "+1 234", "1e10"),
    *("2024-11-21T19:46:00Z", "(555) 123-4567", "$1,234.56"),
    *(
        "".join(map(chr, range(zero, zero + 10)))
        for zero in (0x660, 0x6F0, 0x966, 0x9E6, 0xE50, 0xFF10, 0x1040, 0x1D7CE)
    ),
    *("½⅓¼", "²³¹", "ⅠⅡⅢ", "一二三四五六七八九十", "〇", "①②③", "٣ x ३ y ๓", "１２３４", "5️⃣", "x²+y³", "10⁵"),
]

LONG = [
    "a" * 50,
    "a" * 257,
    "ab" * 100,
    "aaaaab" * 20,
    "Z" * 33,
    "0" * 65,
    "-" * 81,
    "=" * 40 + "\n" + "=" * 40,
    "#" * 7 + " x " + "*" * 19,
    "." * 13,
    "哈" * 40,
    "あ" * 17,
    "é" * 30,
    "e\u0301" * 15,
    "😀" * 12,
    "ха" * 25,
    "supercalifragilisticexpialidocious" * 4,
    "Grundstücksverkehrsgenehmigungszuständigkeitsübertragungsverordnung " * 3,
    "word " * 60,
    "x = [" + ", ".join(map(str, range(90))) + "]",
    "\n\n".join(f"{n}. Item {n}:\n\n\t- {'sub ' * (n % 4)}" for n in range(20)),
]

SCRIPTS = [
    "Tiếng Việt có dấu: ắ ằ ẳ ẵ ặ ấ ầ ẩ ẫ ậ ế ề ể ễ ệ ố ồ ổ ỗ ộ ớ ờ ở ỡ ợ ứ ừ ử ữ ự",
    "Đường xa ướt mưa, người ơi hãy nhớ",
    "Ångström naïve Çelik über Škoda",
    "각 한글 자모",
    "が ぎ ぐ パピプ",
    "й ё ї ў",
    "ক্ষ ণ্ড  হ্যাঁ",
]
DECOMPOSED = [unicodedata.normalize("NFD", text) for text in SCRIPTS]

# Every kind of neighbour around a letter, a digit, a mark and a sign: where the cuts into words meet.
NEIGHBOURS = [
    left + mid + "b"
    for left in ("a", "7", "!", "é", "\n")
    for mid in ("'s", " ", "  ", "\n ", "\t", "_", "中", "\u0301", "42", "?!", "🙂")
]

TEXTS = list(dict.fromkeys([*PLAIN, *WHITE, *CONTROLS, *DIGITS, *LONG, *SCRIPTS, *DECOMPOSED, *NEIGHBOURS]))
