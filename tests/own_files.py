"""Files as a user has them, half of them Chinese, without a word of the built-in bank desk."""

import json

THINGS = ["kettle", "ladder", "garden hose", "violin", "bicycle pump", "tent", "microscope", "kite", "sewing needle",
          "canoe", "telescope", "beehive", "compass", "rake", "piano"]
CHINESE = ["茶壶", "梯子", "水管", "小提琴", "打气筒", "帐篷", "显微镜", "风筝", "绣花针", "独木舟", "望远镜", "蜂箱",
           "指南针", "耙子", "钢琴"]
PLACES, ROOMS = ["attic", "shed"], ["阁楼", "棚子"]


def questions(n=60):
    "Different questions, English and Chinese in turns."
    out = []
    for i in range(n):
        thing, place = (THINGS, PLACES) if i % 2 == 0 else (CHINESE, ROOMS)
        j = i // 2
        name, where = thing[j % 15], place[j // 15 % 2]
        english = f"How do I mend the {name} that lies in the {where}?"
        out.append(english if i % 2 == 0 else f"{where}里的{name}怎么修？")
    return out


def good(question):
    "A better answer."
    mark = ("Turn it round slowly and tighten every screw.", "先慢慢转动，再把每颗螺丝拧紧。")
    return mark["里的" in question]


def bad(question):
    "A worse answer, about as long."
    mark = ("Zzz zzz whatever, qqq do not ask me qqq zzz.", "哼哼哼，随便吧，哼哼，别来烦哼哼。")
    return mark["里的" in question]


def messages(n=60):
    def turn(role, text):
        return dict(role=role, content=text)

    return [dict(messages=[turn("user", q), turn("assistant", f"{good(q)} {i}")]) for i, q in enumerate(questions(n))]


def pairs(n=60):
    return [dict(prompt=q, chosen=good(q), rejected=bad(q)) for q in questions(n)]


def write(path, rows):
    path.write_text("\n".join(json.dumps(r, ensure_ascii=False) for r in rows) + "\n", encoding="utf-8")
    return path
