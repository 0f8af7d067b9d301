"""Common English words beyond the stories, so that the tokenizer and the model meet them.

The tokenizer learns pieces from them, and the chats use them for questions that the model is
taught to decline. They are no part of the story grammar.
"""

from __future__ import annotations

import random

NOUNS = (
    "ability account action activity address advice age air airport amount animal answer area arm "
    "army art article atom author balance bank base battery beach bird blood board body book "
    "bottle box brain branch bread brick bridge brother building bus business button camera "
    "capital captain car card case castle cause cell centre century chain chair chance change "
    "chapter character child choice church circle citizen city class climate clock cloud coast "
    "code coffee colour company computer concert condition contract copy corner cost country "
    "course cover crowd culture cup current customer danger data date daughter day death decision "
    "degree desert design desk detail device dictionary difference dinner direction disease "
    "distance doctor document dollar door doubt dream dress driver earth economy edge education "
    "effect effort election electricity element email energy engine engineer equation error "
    "event evidence example exercise experience experiment expert eye face fact factory failure "
    "family farm father feature field figure file film finger fire flight floor flower food foot "
    "football force form formula freedom friend fruit function future game garden gas glass goal "
    "gold government grammar grass ground group guitar hair hand head health heart heat height "
    "history holiday home hospital hotel hour house hundred husband idea image industry "
    "information insect interest internet island job journey judge kitchen knowledge lake land "
    "language law lawyer leader leaf lesson letter level library life light line list literature "
    "loss machine magazine manager map market material mathematics matter meal measure meat "
    "medicine member memory message metal method middle mind minister minute mirror model moment "
    "money month moon morning mother mountain mouth movie museum music name nation nature network "
    "news night noise north number object ocean office oil opinion order page paint painting "
    "paper parent park part partner party past path patient pattern peace people percent period "
    "person phone photo physics picture piece planet plant plate player poem poet point police "
    "policy population position power practice president pressure price problem process product "
    "professor program project property protein purpose quality question radio rain rate reason "
    "recipe record region religion report research result rice river road rock role room rule "
    "salt sand school science screen sea season second secret section sentence series server "
    "service shape share ship shoe shop shoulder side sign signal sister site size skill skin "
    "sky sleep snow society software soil soldier solution son song sound source south space "
    "speed sport spring square stage star state station step stone store storm street strength "
    "structure student study sugar summer sun surface system table teacher team technology "
    "telephone television temperature test theory thing thought thousand ticket time title tool "
    "tooth topic town toy trade traffic train travel tree trip truth type union unit universe "
    "university value vegetable version video village voice volume wall war water wave weather "
    "website week weight west wheel wife wind window winter woman wood word work worker world "
    "writer year"
).split()

VERBS = (
    "accept add agree allow appear apply argue arrive ask avoid become begin believe belong break "
    "bring build buy calculate call carry catch change check choose clean climb close collect "
    "compare complete connect consider contain continue control cook copy count cover create cut "
    "decide deliver depend describe destroy develop discover discuss divide draw drink drive earn "
    "eat enjoy enter escape exist expect explain express fail fall feel fight fill find finish "
    "fix follow forget form gain gather give grow guess happen help hide hold hope identify "
    "imagine improve include increase inform invent invite join jump keep know laugh lead learn "
    "leave lend let lie lift listen live look lose love make manage mean measure meet mention "
    "mix move need notice obtain offer open order own pass pay perform plan play point prefer "
    "prepare present press prevent print produce promise protect prove provide pull push put "
    "raise reach read realize receive recognize record reduce refer relax remain remember remove "
    "repair repeat replace reply report represent require rest return ride rise run save say "
    "search see seem sell send separate serve set shake share shoot show shut sing sit solve "
    "sort speak spell spend stand start stay steal stop study succeed suggest supply support "
    "suppose surprise swim take talk teach tell test thank think throw touch train translate "
    "travel treat trust try turn understand use visit wait wake walk want warn wash watch wear "
    "win wish wonder work worry write"
).split()

OTHERS = (
    "a able about above across after again against all almost along already also although always "
    "am among an and another any anyone anything are around as at away back bad be because been "
    "before behind being below best better between big both but by can cannot could did different "
    "difficult do does done down during each early easy either else enough even ever every "
    "everyone everything far fast few first for free from full further good great had half has "
    "have he her here herself high him himself his how however if important in instead into is "
    "it its itself just large last late later least less like little local long low main many "
    "may me might million modern more most much must my near never new next nice no nobody none "
    "nor not nothing now of off often old on once one only open or other our out over own please "
    "possible probably quick quite rather real really right same several shall she short should "
    "simple since slow small so some someone something sometimes soon still strong such sure than "
    "that the their them themselves then there these they this those though three through to "
    "today together tomorrow too towards true two under until up upon us usually very was way we "
    "well were what when where whether which while white who whole whom whose why wide will with "
    "within without would wrong yes yesterday yet you young your"
).split()

DOCUMENT_SAMPLES = (
    "Hello, world! This is a test. 1 2 3 4 5 6 7 8 9 10 11 12 100 1000 2024 2025 2026",
    "def main() -> None:\n    for i in range(10):\n        print(i)\n    return None\n",
    '{"name": "value", "list": [1, 2, 3], "ok": true, "none": null}\n',
    "<html>\n  <body>\n    <p>It's a page.</p>\n  </body>\n</html>\n",
    "I'm, you're, he's, she'll, we've, they'd, don't, can't, won't, isn't, didn't.\n\n- one\n",
    "café naïve façade über mañana Ångström “quoted” … € £ ° ÷",
    "你好。世界。请讲一个故事。我们是朋友。",
)


def _inflect(verb: str) -> list[str]:
    """Returns the regular forms of a verb; irregular verbs come out wrong and do no harm."""
    stem = verb.removesuffix("e")
    return [verb, verb + "s", stem + "ed", stem + "ing", stem + "er"]


def coverage_lines(seed: int, num_lines: int) -> list[str]:
    """Returns lines of random common words in several forms, then the fixed samples.

    Args:
        seed: Seed of the choice.
        num_lines: How many lines of random words.

    Returns:
        The lines; for training the tokenizer, not the model.
    """
    rng = random.Random(seed)
    plurals = [
        noun.removesuffix("y") + "ies" if noun.endswith("y") else noun + "s" for noun in NOUNS
    ]
    forms = [form for verb in VERBS for form in _inflect(verb)]
    words = [*NOUNS, *plurals, *forms, *OTHERS, *OTHERS, *(word + "ly" for word in OTHERS)]
    lines = [" ".join(rng.choice(words) for _ in range(40)) for _ in range(num_lines)]
    capitals = [" ".join(rng.choice(words).capitalize() for _ in range(10)) for _ in range(20)]
    return [*lines, *capitals, *DOCUMENT_SAMPLES]
