"""Every kind of personal data in every surrounding."""
from __future__ import annotations

from datetime import date

from hypothesis import given, settings, strategies as st

from mlcourse.privacy import PII, luhn, scrub

DIGITS = "0123456789"


def digits(n): return st.text(DIGITS, min_size=n, max_size=n)


def checked(beginning):
    "The beginning of a card's number with its check digit."
    return next(beginning + d for d in DIGITS if luhn(beginning + d))


def grouped(number, sizes, gap):
    parts, at = [], 0
    for size in sizes:
        parts.append(number[at:at + size])
        at += size
    return gap.join(p for p in parts if p)


@st.composite
def cards(draw):
    first, rest = draw(st.sampled_from("23456")), draw(digits(14))
    if draw(st.booleans()):
        number = checked(first + rest)
        sizes = draw(st.sampled_from([(16,), (4, 4, 4, 4), (8, 8)]))
    else:
        number = checked("3" + rest[:13])
        sizes = draw(st.sampled_from([(15,), (4, 6, 5)]))
    return grouped(number, sizes, draw(st.sampled_from([" ", "-", "\u00a0", "–"])))


def iban(rest):
    code = "".join(str(int(c, 36)) for c in rest + "DE00")
    return f"DE{98 - int(code) % 97:02}{rest}"


def person(region, day, order):
    "A number of a resident of China with its check digit."
    digits = f"{region}{day:%Y%m%d}{order:03}"
    rest = sum(int(d) * pow(2, 17 - i, 11) for i, d in enumerate(digits)) % 11
    return digits + "10X98765432"[rest]


letters = "abcdefghijklmnopqrstuvwxyz"
word = st.text(letters, min_size=1, max_size=9)
octet = st.integers(0, 255).map(str)
SECRETS = dict(
    EMAIL=st.builds("{}.{}@{}.example.org".format, word, word, word),
    CARD=cards(),
    IBAN=digits(18).map(iban).map(lambda s: grouped(s, (4,) * 6, " ")),
    IP=st.tuples(octet, octet, octet, octet).map(".".join),
    ID=st.builds(person, st.integers(110000, 659999),
                 st.dates(date(1900, 1, 1), date(2099, 12, 31)), st.integers(0, 999)),
    KEY=st.text(letters + DIGITS, min_size=24, max_size=36).map("hf_{}".format),
    PHONE=digits(7).map("+49 30 {}".format) | digits(8).map("138{}".format))
FORMS = {"plain": {}, "wide": {c: c + 0xfee0 for c in range(0x21, 0x7f)},
         "Arabic": {ord(str(d)): 0x660 + d for d in range(10)},
         "Devanagari": {ord(str(d)): 0x966 + d for d in range(10)}}
# what may stand around: punctuation, other scripts, other numbers and words at a distance
NEAR = st.sampled_from(["", *" .,()[]«»'\":;/\n\t…|<>*!?", "的", "号码", "。", "，", "の", "은"])
FAR = st.sampled_from(["", "Order", "Ж", "你好", "kaart", "12", "2026-01-02", "07:15", "x = 3"])


@given(kind=st.sampled_from(sorted(SECRETS)), data=st.data(), near=st.tuples(NEAR, NEAR),
       far=st.tuples(FAR, FAR), form=st.sampled_from([*FORMS]))
@settings(max_examples=1500, deadline=None)
def test_every_kind_in_every_surrounding(kind, data, near, far, form):
    secret = data.draw(SECRETS[kind]).translate(FORMS[form])
    before = f"{far[0]} {near[0]}" if far[0] else near[0]
    after = f"{near[1]} {far[1]}" if far[1] else near[1]
    if kind == "PHONE" and after.strip(" .()/\t")[:1] in tuple(DIGITS): after = ""   # its own?
    clean, found = scrub(before + secret + after)
    assert clean == f"{before}<{kind}>{after}" and found == {kind: 1}


@given(st.lists(st.sampled_from(sorted(SECRETS)), min_size=2, max_size=5), st.data())
@settings(max_examples=300, deadline=None)
def test_many_in_one_text(kinds, data):
    text = " and ".join(data.draw(SECRETS[kind]) for kind in kinds)
    assert scrub(text)[0] == " and ".join(f"<{kind}>" for kind in kinds)


@given(st.text(max_size=200) | st.text("0123456789 .-:@+abcdef", max_size=200))
@settings(max_examples=500, deadline=None)
def test_scrubbing_twice_changes_nothing_more(text):
    once, _ = scrub(text)
    assert scrub(once) == (once, {})


@given(st.integers(946_684_800_000, 1_999_999_999_999), st.sampled_from([1, 1000, 1_000_000]))
@settings(max_examples=500, deadline=None)
def test_a_clock_is_no_card(milliseconds, factor):
    text = f"at {milliseconds * factor} it began"
    if milliseconds >= 1_000_000_000_000: assert scrub(text) == (text, {})


@given(st.floats(0, 1))
@settings(max_examples=500, deadline=None)
def test_a_fraction_is_no_card(x):
    assert scrub(f"p = {x:.16f}") == (f"p = {x:.16f}", {})


def test_a_long_text_takes_no_long_time():
    for piece in ("a.b-", "1234 ", "4.", "a", "+1 ", "::a", "DE12 ", "@", "ab@c.", "eyJ"):
        scrub(piece * 20_000)
    assert set(PII) == set(SECRETS)
