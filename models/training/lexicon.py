"""The words of the story grammar, as data: what may fill a slot, and what follows from what.

The generator (`grammar`) draws from these tables and the recogniser (`recogniser`) checks against
them; neither calls the other. `FREE` slots take any of their values; a `BOUND` slot takes a value
that its parent slot allows, which is how an ending comes to follow from its cause.
"""

from __future__ import annotations

Table = dict[str, tuple[str, ...]]
"""Value of the parent slot -> values that may follow from it."""


def _list(text: str) -> tuple[str, ...]:
    """Splits a comma-separated list."""
    return tuple(word.strip() for word in text.split(","))


HE_NAMES = _list(
    "Pip, Tom, Ben, Max, Leo, Sam, Finn, Oscar, Hugo, Milo, Jack, Toby, Otto, Felix, Rufus, Theo, "
    "Gus, Hal, Jasper, Ned, Oliver, Percy, Ralph, Simon, Victor, Walter, Arthur, Bruno, Casper, "
    "Dan, Edgar, Fred, George, Harry, Ivan, Jonas, Karl, Louis, Martin, Noah, Paul, Quentin, "
    "Robin, Sven, Timmy, Ulf, Vincent, Will, Xaver, Zack, Albert, Basil, Clive, Dexter, Elmer, "
    "Frank, Gilbert, Henry, Igor, Jim"
)
SHE_NAMES = _list(
    "Lily, Mia, Anna, Ruby, Lucy, Ella, Rosie, Daisy, Clara, Nora, Ivy, Molly, Bella, Poppy, "
    "Hazel, Luna, Maya, Stella, Tilly, Zoe, Alice, Betty, Cora, Dora, Emma, Fiona, Greta, Hanna, "
    "Ida, Julia, Kate, Lena, Maria, Nina, Olga, Paula, Queenie, Rita, Sara, Tina, Ursula, Vera, "
    "Wendy, Yara, Zelda, Amber, Bonnie, Celia, Della, Edith, Flora, Gloria, Holly, Iris, Jenny, "
    "Kitty, Laura, Mabel, Nelly, Olive"
)
ONSETS = _list(
    "b, c, d, f, g, h, j, k, l, m, n, p, r, s, t, v, w, z, br, bl, ch, cl, cr, dr, fl, fr, gl, gr, "
    "ph, pl, pr, qu, sc, sh, sk, sl, sm, sn, sp, st, sw, th, tr, tw, wh"
)
VOWELS = _list("a, e, i, o, u, a, e, i, o, ai, ea, ee, ie, oo, ou, au, y")
CODAS = _list(
    "b, ck, d, f, g, k, l, ll, m, n, p, r, rr, s, ss, t, tt, x, z, ld, lf, lt, mb, mp, nd, ng, nk, "
    "nt, rd, rk, rl, rm, rn, rt, sh, sk, st, th"
)

ANIMALS = _list(
    "fox, rabbit, bear, mouse, owl, frog, duck, cat, dog, hedgehog, squirrel, turtle, badger, "
    "otter, pig, goat, sheep, deer, mole, beaver, wolf, lion, tiger, elephant, monkey, giraffe, "
    "penguin, panda, koala, kitten, puppy, pony, donkey, goose, hen, crow, sparrow, snail, lizard, "
    "camel, parrot, swan, toad, bat, seal, whale, horse, cow, zebra, kangaroo"
)
PEOPLE = _list(
    "dragon, giant, robot, baker, farmer, sailor, shepherd, gardener, knight, painter, fairy, "
    "dwarf, elf, pirate, tailor, miller, teacher, doctor, clown, fisherman"
)
GENDERED_KINDS = {
    "boy": "he",
    "prince": "he",
    "king": "he",
    "wizard": "he",
    "grandfather": "he",
    "girl": "she",
    "princess": "she",
    "queen": "she",
    "witch": "she",
    "grandmother": "she",
}
KINDS = (*ANIMALS, *PEOPLE, *GENDERED_KINDS)

TRAITS = _list(
    "brave, curious, clever, cheerful, gentle, quiet, proud, small, young, old, silly, careful, "
    "friendly, little, patient, playful, lonely, busy, wise, shy, merry, lively, polite, eager"
)
OBJECTS = _list(
    "ball, hat, scarf, kite, key, ring, book, drum, lantern, bell, coin, blanket, map, whistle, "
    "button, basket, spoon, teapot, umbrella, cap, paintbrush, flute, compass, necklace, doll, "
    "feather, marble, mitten, cup, box"
)
COLOURS = _list(
    "red, blue, green, yellow, golden, silver, purple, white, striped, shiny, orange, pink, brown, "
    "spotted, tiny"
)
BREAKAGES: Table = {
    "kite": ("tore in two", "was ripped down the middle"),
    "drum": ("got a big hole", "burst with a bang"),
    "doll": ("lost an arm", "came apart at the seams"),
    "lantern": ("lost its handle", "cracked on one side"),
    "book": ("lost half of its pages", "fell apart"),
    "basket": ("lost its handle", "came apart on one side"),
    "flute": ("snapped in the middle", "broke in two"),
    "umbrella": ("turned inside out", "tore along one side"),
    "teapot": ("lost its lid", "cracked from top to bottom"),
    "blanket": ("tore in two", "was ripped from end to end"),
}
REPAIRS: Table = {
    "kite": ("paper and glue", "a roll of tape"),
    "drum": ("a new piece of leather", "a patch and some glue"),
    "doll": ("a needle and thread", "some wool and a needle"),
    "lantern": ("a piece of wire", "a strip of tin"),
    "book": ("a pot of paste", "paper and glue"),
    "basket": ("a handful of reeds", "some strong twine"),
    "flute": ("a ring of copper", "wax and string"),
    "umbrella": ("a bit of cloth", "a needle and thread"),
    "teapot": ("a pot of glue", "a bit of clay"),
    "blanket": ("a needle and thread", "a ball of wool"),
}
INGREDIENTS: Table = {
    "honey cake": ("honey",),
    "apple pie": ("apples",),
    "carrot cake": ("carrots",),
    "blueberry tart": ("blueberries",),
    "pumpkin pie": ("pumpkins",),
    "lemon cake": ("lemons",),
    "nut cake": ("nuts",),
    "cherry pie": ("cherries",),
    "cheese pie": ("cheese",),
    "loaf of bread": ("flour",),
    "plum cake": ("plums",),
    "butter cake": ("butter",),
}
SOURCES: Table = {
    "honey": ("the old beehive", "the hollow oak of the bees"),
    "apples": ("the orchard", "the apple trees on the hill"),
    "carrots": ("the vegetable field", "the garden behind the church"),
    "blueberries": ("the dark wood", "the bushes by the moor"),
    "pumpkins": ("the pumpkin patch", "the vegetable field"),
    "lemons": ("the harbour market", "the warm glass house"),
    "nuts": ("the hazel grove", "the dark wood"),
    "cherries": ("the orchard", "the cherry trees by the road"),
    "cheese": ("the mountain dairy", "the goat farm"),
    "flour": ("the windmill", "the water mill"),
    "plums": ("the orchard", "the plum trees by the wall"),
    "butter": ("the mountain dairy", "the cow farm"),
}
CROSSINGS: Table = {
    "wide river": ("made a raft out of branches", "walked across on a fallen log"),
    "high wall": ("borrowed a ladder and climbed over it", "dug a tunnel under it"),
    "thick fog": ("lit a lantern and walked slowly", "followed the sound of the church bell"),
    "deep ditch": ("laid a plank across it", "swung over it on a rope"),
    "locked gate": ("found the key under a stone", "squeezed through the bars"),
    "steep cliff": ("tied a rope to a tree and pulled", "cut steps with a little axe"),
    "thorny hedge": ("crept through a small gap", "cut a path with garden shears"),
    "muddy swamp": ("hopped from stone to stone", "walked on two wide boards"),
}
REMEDIES: Table = {
    "was stuck in the deep mud": ("threw a rope and pulled hard", "laid a plank across the mud"),
    "was trapped under a heavy branch": (
        "lifted the branch with a pole",
        "sawed the branch in two",
    ),
    "had fallen into a deep pit": ("let down a ladder", "let down a rope with a loop"),
    "was shivering with cold": ("lit a warm fire", "shared a thick woollen coat"),
    "had not eaten for two days": ("shared a basket of bread", "cooked a pot of hot soup"),
    "had a thorn in one foot": ("pulled the thorn out", "drew the thorn out with great care"),
    "had lost the way home": ("drew a map of the road", "led the way with a lantern"),
    "was caught in an old net": ("cut the net with a knife", "untied the net knot by knot"),
}
RELIEFS: Table = {
    "was stuck in the deep mud": ("on dry ground again",),
    "was trapped under a heavy branch": ("free again",),
    "had fallen into a deep pit": ("out of the pit",),
    "was shivering with cold": ("warm again",),
    "had not eaten for two days": ("full and happy",),
    "had a thorn in one foot": ("able to walk again",),
    "had lost the way home": ("safe at home",),
    "was caught in an old net": ("free again",),
}
FAVOURS: Table = {
    "a storm had blown the roof off the house": ("built a new roof", "nailed the roof back on"),
    "the well had run dry": ("dug a deeper well", "carried water from the spring"),
    "the cart had lost a wheel": ("made a new wheel", "put the wheel back on"),
    "the firewood was all gone": ("chopped a pile of wood", "brought a sledge full of logs"),
    "the boat had a leak": ("sealed the leak with tar", "patched the boat with a board"),
    "the door was blocked by snow": ("shovelled the snow away", "dug a path through the snow"),
}
ORIGINS: Table = {
    "the dark": ("been locked in a cellar", "lost the way at night"),
    "deep water": ("fallen into a pond", "been pulled under by a wave"),
    "thunder": ("seen lightning strike a tree", "been alone in a great storm"),
    "high places": ("fallen out of a tree", "slipped on a steep roof"),
    "the old forest": ("heard wolves howl there", "been lost among the trees"),
    "crowds": ("been lost at a fair", "been pushed over at the market"),
}
DANGERS: Table = {
    "the dark": ("went into a cave and did not come out", "was stuck at the bottom of a mine"),
    "deep water": ("fell into the lake and could not swim", "was drifting away on a raft"),
    "thunder": ("was caught outside in a thunderstorm", "was alone on the hill in a storm"),
    "high places": ("was stuck at the top of a tree", "could not get down from the tower"),
    "the old forest": ("ran into the old forest and got lost", "was trapped in the old forest"),
    "crowds": ("got lost at the busy fair", "fainted in the middle of the crowded market"),
}
DEEDS: Table = {
    "the dark": ("took a lantern and went down alone", "lit a torch and stepped inside"),
    "deep water": ("jumped in with a rope", "swam out as fast as possible"),
    "thunder": ("ran out into the storm", "walked through thunder and rain"),
    "high places": ("climbed up step by step", "went all the way up with a rope"),
    "the old forest": (
        "walked between the tall black trees",
        "followed the tracks into the forest",
    ),
    "crowds": ("pushed a way through the crowd", "stood on a barrel and called out loudly"),
}
DOINGS: Table = {
    "tapping": ("was mending a broken chair", "was nailing a shelf to the wall"),
    "scratching": ("was writing a long letter", "was sharpening a pencil"),
    "splashing": ("was washing socks in a tub", "was taking a bath in a barrel"),
    "ringing": ("was polishing an old bell", "was winding up a broken clock"),
    "humming": ("was singing to stay awake", "was practising a song"),
    "snoring": ("had fallen asleep on a pile of hay", "was sleeping behind the door"),
    "sobbing": ("was crying over a broken toy", "was crying because of a bad dream"),
    "crunching": ("was eating a crisp apple", "was nibbling at a box of biscuits"),
}
EXCUSES: Table = {
    "tapping": ("It has to be ready by morning",),
    "scratching": ("I could not do it by day",),
    "splashing": ("I was so very dirty",),
    "ringing": ("I wanted it to work again",),
    "humming": ("I thought that nobody could hear me",),
    "snoring": ("I was so very tired",),
    "sobbing": ("I did not want to wake anyone",),
    "crunching": ("I was so very hungry",),
}
FIXES: Table = {
    "for weeks there was no rain": ("carried water from the stream", "dug a ditch from the pond"),
    "hungry snails came to eat the leaves": (
        "spread ashes on the ground",
        "carried the snails away",
    ),
    "weeds grew all around it": ("pulled out every weed", "cleared the weeds with a hoe"),
    "one night there was a frost": ("covered it with straw", "built a little glass roof over it"),
    "a storm bent the little plant": ("tied it to a stick", "built a fence against the wind"),
    "the birds picked at it": ("put up a scarecrow", "hung a net over it"),
}
MEALS: Table = {
    "pumpkin": ("pot of pumpkin soup", "pumpkin pie"),
    "carrot": ("carrot stew", "carrot cake"),
    "melon": ("bowl of melon salad", "jug of melon juice"),
    "turnip": ("turnip stew", "pot of turnip soup"),
    "cabbage": ("cabbage soup", "cabbage pie"),
    "onion": ("onion tart", "pot of onion soup"),
    "potato": ("potato salad", "potato pie"),
    "beetroot": ("beetroot soup", "beetroot salad"),
}
CRAFTS: Table = {
    "sail across the lake": ("boat", "raft"),
    "see the world from above": ("glider", "balloon"),
    "win the race down the hill": ("cart", "sledge"),
    "play at the village dance": ("drum", "fiddle"),
    "sleep high up in the tree": ("tree house", "hammock"),
    "carry water up the hill": ("bucket", "wagon"),
}
FAILURES: Table = {
    "boat": ("it leaked", "it tipped over"),
    "raft": ("it fell apart", "it turned in circles"),
    "glider": ("it spun around and fell", "a wing broke"),
    "balloon": ("it would not rise", "it had a hole"),
    "cart": ("a wheel came off", "it rolled to the left"),
    "sledge": ("it would not slide", "it broke in two"),
    "drum": ("it made no sound", "it sounded flat"),
    "fiddle": ("it squeaked", "a string broke"),
    "tree house": ("the floor shook", "the rain came in"),
    "hammock": ("the knot came loose", "it tore"),
    "bucket": ("the handle came off", "it leaked"),
    "wagon": ("it was too heavy", "a wheel came off"),
}
PARTS: Table = {
    "it leaked": ("some tar", "a bit of wax"),
    "it tipped over": ("a heavy stone at the bottom",),
    "it fell apart": ("stronger ropes", "a few more nails"),
    "it turned in circles": ("a good paddle",),
    "it spun around and fell": ("a long tail of ribbons",),
    "a wing broke": ("a stronger wing",),
    "it would not rise": ("more hot air",),
    "it had a hole": ("a patch of silk",),
    "a wheel came off": ("a wooden peg", "a bigger nail"),
    "it rolled to the left": ("two wheels of the same size",),
    "it would not slide": ("some smooth wax",),
    "it broke in two": ("a thicker board",),
    "it made no sound": ("a tighter skin",),
    "it sounded flat": ("a tighter skin",),
    "it squeaked": ("a better bow",),
    "a string broke": ("a stronger string",),
    "the floor shook": ("two more beams",),
    "the rain came in": ("a roof of leaves",),
    "the knot came loose": ("a sailor's knot",),
    "it tore": ("a stronger cloth",),
    "the handle came off": ("a piece of wire",),
    "it was too heavy": ("a second rope",),
}

FREE: Table = {
    "kind": KINDS,
    "fkind": KINDS,
    "trait": TRAITS,
    "ftrait": TRAITS,
    "nest": _list(
        "cosy cottage, small house, snug hut, tall tower, little cabin, stone house, old barn, "
        "round house, crooked house, quiet den, wooden house, tiny room, blue house, warm cave"
    ),
    "near": _list(
        "by the river, at the edge of the forest, near the sea, on a green hill, behind the mill, "
        "beside the lake, in the valley, near the village, under the mountain, by the old bridge, "
        "next to the orchard, at the end of the lane"
    ),
    "hobby": _list(
        "sing songs, look at the clouds, count the stars, paint pictures, tell jokes, dance in the "
        "rain, collect stones, climb trees, read books, bake biscuits, watch the boats, pick "
        "flowers, play hide and seek, listen to the birds, draw maps, skip stones"
    ),
    "weather": _list("sunny, rainy, cold, warm, foggy, snowy, bright, cloudy, frosty, misty, fine"),
    "daypart": _list("morning, afternoon, evening, day"),
    "place": _list(
        "the hill, the market, the lake, the meadow, the forest, the village square, the beach, "
        "the old mill, the pond, the park, the harbour, the castle"
    ),
    "colour": COLOURS,
    "object": OBJECTS,
    "toy": tuple(BREAKAGES),
    "giver": _list(
        "grandmother, grandfather, aunt, uncle, mother, father, sister, brother, cousin"
    ),
    "cause": _list("wind, hole, stream, magpie, forgot"),
    "spot": _list(
        "under the bed, behind the house, under a bench, behind the door, in the shed, under the "
        "table, in the cellar, behind the barn, in the kitchen, under the stairs, in the attic"
    ),
    "tree": _list("oak tree, apple tree, willow, birch, pine tree, elm, chestnut tree"),
    "occasion": _list("birthday, ill, travel"),
    "dish": tuple(INGREDIENTS),
    "obstacle": tuple(CROSSINGS),
    "trouble": tuple(REMEDIES),
    "need": tuple(FAVOURS),
    "fear": tuple(ORIGINS),
    "sound": tuple(DOINGS),
    "monster": _list("ghost, monster, thief, dragon with three heads, ogre, goblin"),
    "light": _list("candle, lantern, torch, lamp"),
    "room": _list("the kitchen, the cellar, the attic, the barn, the garden, the shed, the hall"),
    "drink": _list("hot milk, cocoa, warm tea, hot soup, apple juice, honey tea"),
    "crop": tuple(MEALS),
    "problem": tuple(FIXES),
    "goal": tuple(CRAFTS),
    "material": _list(
        "old boards, cloth and sticks, scraps, rope and planks, things from the attic"
    ),
}
FREE["spot2"] = FREE["spot"]

BOUND: dict[str, tuple[str, Table]] = {
    "breakage": ("toy", BREAKAGES),
    "repair": ("toy", REPAIRS),
    "ingredient": ("dish", INGREDIENTS),
    "source": ("ingredient", SOURCES),
    "crossing": ("obstacle", CROSSINGS),
    "remedy": ("trouble", REMEDIES),
    "relief": ("trouble", RELIEFS),
    "favour": ("need", FAVOURS),
    "origin": ("fear", ORIGINS),
    "danger": ("fear", DANGERS),
    "deed": ("fear", DEEDS),
    "doing": ("sound", DOINGS),
    "excuse": ("sound", EXCUSES),
    "fix": ("problem", FIXES),
    "meal": ("crop", MEALS),
    "craft": ("goal", CRAFTS),
    "failure": ("craft", FAILURES),
    "part": ("failure", PARTS),
}

DIFFERENT = {"spot2": "spot", "friend": "hero", "fkind": "kind"}
"""A slot and the earlier slot whose value it must not repeat."""

PRONOUNS = {
    "he": {"he": "he", "him": "him", "his": "his"},
    "she": {"he": "she", "him": "her", "his": "her"},
}
"""Gender of the person -> slot form -> word."""


def article(phrase: str) -> str:
    """Returns `phrase` with "a" or "an" before it."""
    return f"{'an' if phrase[0] in 'aeiou' else 'a'} {phrase}"
