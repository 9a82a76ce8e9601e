"""Notes in Chinese: found, answered, refused and cited as in English, and nothing false certified."""
from types import SimpleNamespace

import pytest
from mlcourse.assets import STANDINS
from mlcourse.evals import is_refusal, sentences, support, supported, unsupported, words
from mlcourse.notes import decode_named, read_folder
from mlcourse.rag import GATES, answer
from mlcourse.search import BM25, Retriever, Store, tokenize
from test_search import Letters

NOTES = {
    "hans": {
        "花园.md": "# 花园\n\n栅栏是2021年春天修好的，由隔壁的木匠老周完成，用的是松木。\n\n## 浇水\n\n玫瑰每天早上需要十二升水。"
                 "夏天高温时，傍晚还要再浇一次。番茄不能从叶子上面浇，否则容易得病。\n\n## 肥料\n\n堆肥放在车库后面，每年三月翻一次。\n",
        "服务器.md": "# 家里的服务器\n\n服务器监听8443端口，由小安负责备份。备份每周日凌晨两点开始，保存在阁楼的硬盘上。\n\n"
                  "## 重启\n\n路由器死机时，先拔掉电源等三十秒，再插回去。不要按复位键，否则所有设置都会丢失。\n",
        "旅行.md": "# 去云南的旅行\n\n我们在大理住了五天，旅馆的老板娘做的米线很好吃。洱海边骑车一圈大约要八个小时。\n\n"
                 "## 费用\n\n火车票一共花了一千二百元，住宿花了两千元。\n"},
    "hant": {
        "花園.md": "# 花園\n\n柵欄是2021年春天修好的，由隔壁的木匠老周完成，用的是松木。\n\n## 澆水\n\n玫瑰每天早上需要十二升水。"
                 "夏天高溫時，傍晚還要再澆一次。番茄不能從葉子上面澆，否則容易得病。\n\n## 肥料\n\n堆肥放在車庫後面，每年三月翻一次。\n",
        "伺服器.md": "# 家裡的伺服器\n\n伺服器監聽8443連接埠，由小安負責備份。備份每週日凌晨兩點開始，保存在閣樓的硬碟上。\n\n"
                  "## 重啟\n\n路由器當機時，先拔掉電源等三十秒，再插回去。不要按重設鍵，否則所有設定都會遺失。\n",
        "旅行.md": "# 去雲南的旅行\n\n我們在大理住了五天，旅館的老闆娘做的米線很好吃。洱海邊騎車一圈大約要八個小時。\n\n"
                 "## 費用\n\n火車票一共花了一千二百元，住宿花了兩千元。\n"}}
ASKED = {   # question, file, true sentence, false sentences
    "hans": [
        ("玫瑰每天早上需要多少水？", "花园.md", "玫瑰每天早上需要十二升水。",
         ["玫瑰每天早上需要二十升水。", "玫瑰每天晚上需要十二升水。", "番茄每天早上需要十二升水。"]),
        ("服务器监听哪个端口？", "服务器.md", "服务器监听8443端口。",
         ["服务器监听8080端口。", "路由器监听8443端口。", "服务器关闭8443端口。", "服务器不监听8443端口。"]),
        ("谁负责备份？", "服务器.md", "由小安负责备份。", ["由小李负责备份。", "由老周负责备份。", "小安负责浇水。"]),
        ("路由器死机时怎么办？", "服务器.md", "先拔掉电源等三十秒，再插回去。",
         ["先拔掉电源等十三秒，再插回去。", "先拔掉网线等三十秒，再插回去。", "先按复位键，再插回去。"]),
        ("火车票花了多少钱？", "旅行.md", "火车票一共花了一千二百元。",
         ["火车票一共花了二千一百元。", "机票一共花了一千二百元。", "火车票一共花了两千元。"]),
        ("堆肥放在哪里？", "花园.md", "堆肥放在车库后面。",
         ["堆肥放在车库前面。", "堆肥放在厨房后面。", "硬盘放在车库后面。", "堆肥没放在车库后面。"])],
    "hant": [
        ("玫瑰每天早上需要多少水？", "花園.md", "玫瑰每天早上需要十二升水。",
         ["玫瑰每天早上需要二十升水。", "玫瑰每天晚上需要十二升水。", "番茄每天早上需要十二升水。"]),
        ("伺服器監聽哪個連接埠？", "伺服器.md", "伺服器監聽8443連接埠。",
         ["伺服器監聽8080連接埠。", "路由器監聽8443連接埠。", "伺服器關閉8443連接埠。", "伺服器不監聽8443連接埠。"]),
        ("誰負責備份？", "伺服器.md", "由小安負責備份。", ["由小李負責備份。", "由老周負責備份。", "小安負責澆水。"]),
        ("路由器當機時怎麼辦？", "伺服器.md", "先拔掉電源等三十秒，再插回去。",
         ["先拔掉電源等十三秒，再插回去。", "先拔掉網線等三十秒，再插回去。", "先按重設鍵，再插回去。"]),
        ("火車票花了多少錢？", "旅行.md", "火車票一共花了一千二百元。",
         ["火車票一共花了二千一百元。", "機票一共花了一千二百元。", "火車票一共花了兩千元。"]),
        ("堆肥放在哪裡？", "花園.md", "堆肥放在車庫後面。",
         ["堆肥放在車庫前面。", "堆肥放在廚房後面。", "硬碟放在車庫後面。", "堆肥沒放在車庫後面。"])]}


class Blind(Letters):
    "An embedder that does not know Chinese."
    def knows(self, text): return text.isascii()
    def encode_question(self, text): return self.encode([text])[0]

class Says:
    "An engine that says one thing."
    def __init__(self, text): self.text = text
    def chat(self, messages, max_new_tokens): return SimpleNamespace(text=self.text)


@pytest.fixture(params=list(NOTES))
def script(request, tmp_path):
    notes = tmp_path / "notes"
    notes.mkdir()
    for name, text in NOTES[request.param].items(): (notes / name).write_text(text, "utf-8")
    store = Store(tmp_path / "store", Blind(), 400)
    store.update(notes)
    return Retriever(store), ASKED[request.param]


def test_the_right_file_is_first(script):
    retriever, asked = script
    found = [retriever.search(q, 1)[0].chunk.path == file for q, file, _, _ in asked]
    assert sum(found) >= 5, found


def test_true_sentences_are_kept_and_false_ones_never(script):
    retriever, asked = script
    gate, answered = GATES[STANDINS["embedder"]], 0
    for question, file, true, false in asked:
        found = answer(question, retriever, Says(true), k=3, gate=gate)
        answered += not found.refused and found.citations[0][1].path == file
        for sentence in false:
            said = answer(question, retriever, Says(sentence), k=3, gate=None)
            assert said.refused, (sentence, said.text)
    assert answered >= 5


def test_a_set_of_forty_false_sentences():
    certified = [s for script, asked in ASKED.items() for _, file, true, false in asked
                 for s in false if supported(s, NOTES[script][file])]
    assert sum(len(false) for asked in ASKED.values() for *_, false in asked) >= 40
    assert certified == []
    for script, asked in ASKED.items():
        for _, file, true, _ in asked:
            passage = NOTES[script][file]
            assert support(true, passage) == 1.0 and supported(true, passage), true


@pytest.mark.parametrize("text, expected", [
    ("Tür schließt", ["tür", "schließt"]), ("Привет мир", ["привет", "мир"]),
    ("שלום עולם", ["שלום", "עולם"]), ("灯塔", ["灯", "塔", "灯塔"])])
def test_words_of_every_script_are_found(text, expected):
    assert tokenize(text) == expected and words(text)
    index = BM25([text, "something else"])
    assert index.search(text, 1)[0][0] == 0


def test_nothing_that_was_not_compared_is_supported():
    for sentence in ("", "It is.", "???", "[1]", "的"):
        assert not supported(sentence, "The lamp is electric. 灯塔很高。"), sentence
    assert unsupported("Anna wrote 7 letters.", "Bram wrote 8 letters.") == {"anna", "7"}


def test_sentences_end_in_every_script():
    assert sentences("风很大。雨也很大！谁来？") == ["风很大。", "雨也很大！", "谁来？"]
    assert [is_refusal(s) for s in ("我不知道。", "筆記裡沒有提到。", "塔高三十一米。")] == [True, True, False]


TEXTS = {
    "gbk": "灯塔高三十一米，有一百四十二级台阶。它是用花岗岩建造的。",
    "gb18030": "林月在灯塔南边种了一个小花园。花园有十二种香草。",
    "big5": "織布機有四片綜框。第一條毯子織了四十六天，送給了郵局的諾拉。",
    "shift_jis": "灯台は三十一メートルの高さです。階段は百四十二段あります。",
    "koi8_r": "Маяк острова высотой тридцать один метр. Он построен из гранита.",
    "cp1252": "Übung macht den Meister, und die Tür schließt früh."}

@pytest.mark.parametrize("encoding", TEXTS)
def test_old_encodings_are_read_and_said_to_be_guesses(tmp_path, encoding):
    text = TEXTS[encoding]
    (tmp_path / "note.md").write_bytes(text.encode(encoding))
    (tmp_path / "plain.md").write_text("灯塔", "utf-8")
    texts, left_out = read_folder(tmp_path)
    assert texts == {"note.md": text, "plain.md": "灯塔"}
    assert list(left_out) == ["note.md"] and "guess" in left_out["note.md"]


def test_one_bad_byte_costs_one_character():
    raw = "塔高三十一米。守塔人是艾达。".encode()
    for bad in (raw[:9] + b"\xff" + raw[9:], raw[:-1], raw[:10] + b"\xff" + raw[11:]):
        text, guess = decode_named(bad)
        assert not guess and "守塔人是艾达" in text
