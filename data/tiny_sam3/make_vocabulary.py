"""The words the embedded base was trained with, and the tokenizer made from them.

The base must reject nouns it never met. That needs subword tokens that many absent nouns share, so
that an unknown word arrives as a sequence of tokens the model has seen to mean "not here".
"""

import json

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import CLIPTokenizer

from data.wall_cracks.make_scenes import BASE_CONCEPTS

ABSENT_NOUNS = tuple(
    """
    acorn anchor ankle ant apple apron arrow ash axe baby bacon badge bag ball balloon banana band bank barn barrel
    basket bat beach bead bean bear beard bed bee beetle bell belt bench berry bike bird blade blanket board boat bone
    book boot bottle bow bowl box boy bracelet bread bridge broom brush bucket bull bus bush butter button cabbage cable
    cage cake calf camel camera can candle cane cap cape car card carpet carrot cart cat cave chain chair chalk cheese
    cherry chest chick chin church circle clam claw cliff cloak clock cloud clover club coast coat coin collar comb cook
    cord cork corn couch cow crab crane crate crayon cream creek crib cross crow crown crumb crystal cube cup curb curtain
    cushion daisy deck deer desk diamond dice dinner dish doll dolphin donkey door dot dragon drain drawer dress drill drum
    duck dust eagle ear egg elbow elephant elk engine eye face fan farm feather fence fern field fig finger fish fist flag
    flame flower flute fly foam foot forest fork fox frame frog fruit garden gate ghost giraffe girl glass globe glove goat
    goose grape grass guitar hair hall ham hammer hand harp hat hawk hay head heart hedge heel hen hill hook horn horse
    hose hotel house ice ink iron island ivy jacket jam jar jeans jelly jet jewel jug juice kettle key king kite kitten
    knee knife knob knot lace ladder lake lamb lamp lawn leaf leg lemon letter lid lime lion lip lizard lock log lorry map
    mask mat meat melon milk mirror mitten money monkey moon mop moth mountain mouse mouth mud mug mushroom nail neck
    needle nest net nose nut oak oar onion orange oven owl ox paint palm pan paper park parrot pea peach pear pearl pen
    pencil person pie pig pigeon pillow pin pipe pizza plane plant plate plug plum pocket pole pond pony pool pot potato
    puppy purse queen quilt rabbit radio rail rain rake raven ribbon rice ring river road robe robin rock rocket roof rope
    rose rug ruler sack saddle sail salad salt sand saw scarf school screw seal seat seed shark sheep shelf shell ship
    shirt shoe shovel sink skate skirt skull sky slide slug smoke snail snake snow soap sock sofa soup spade spider spoon
    spring squirrel stair stamp star statue steam stick stool stove straw stream street string suit sun swan sweater swing
    sword table tail tank tea tent thorn thread thumb tiger toad toast toe tomato tongue tooth towel tower toy track
    tractor train trap tray tree truck trumpet trunk tube tulip turkey turtle umbrella van vase vest violin wagon walnut
    wasp watch water wave weed whale wheat wheel whip whistle wig window wing wolf wood wool worm wreath wrist yarn zebra
    """.split()
)
"""Nouns of things that are never on a synthetic wall: the absent prompts of the base's training."""

HELD_OUT_NOUNS = tuple(
    """
    crack dog fissure fracture split object defect scratch pothole bicycle kangaroo teapot blender ostrich lantern
    basin pebble helmet laptop sandal trolley wallet cactus violet puddle canoe scooter
    """.split()
)
"""Nouns kept out of the word list, "crack" first: the base has to reject them all.

"crack" never occurs in training, not even inside a made-up word. Of the others one turned up as a
made-up word in the shipped run: "dog", once in 96,000 prompts (counted by drawing them all again).
"""

MAX_TEXT_TOKENS = 32
"""What `Sam3Processor` pads every prompt to."""

VOCABULARY_SIZE = 900
"""Bytes twice (inside and at the end of a word), merges, and two special tokens."""


def plural(noun):
    """Return the regular plural of a known concept ("brick" gives "bricks")."""
    return noun + "s"


def build_tokenizer(folder):
    """Train the byte-level BPE on the vocabulary's words, save it to a folder and load it again.

    Known concepts repeat in the corpus so that each becomes a single token, as a frequent word does
    in any BPE; every other word falls apart into shared pieces, down to bytes.
    """
    bpe = Tokenizer(models.BPE(end_of_word_suffix="</w>", unk_token="<|endoftext|>"))
    bpe.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Whitespace(), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY_SIZE,
        initial_alphabet=alphabet,
        special_tokens=["<|startoftext|>", "<|endoftext|>"],
        end_of_word_suffix="</w>",
        show_progress=False,
    )
    known = [word for noun in BASE_CONCEPTS for word in (noun, plural(noun))]
    bpe.train_from_iterator([*(50 * known), *ABSENT_NOUNS], trainer)
    vocabulary, merges = _with_final_bytes(bpe, alphabet)
    tokenizer = CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=MAX_TEXT_TOKENS)
    tokenizer.save_pretrained(folder)
    return CLIPTokenizer.from_pretrained(folder)


def _with_final_bytes(bpe, alphabet):
    """Add every byte's end-of-word form that training did not meet, so that any text tokenises."""
    model = json.loads(bpe.to_str())["model"]
    vocabulary = model["vocab"]
    for byte in sorted(alphabet):
        for token in (byte, byte + "</w>"):
            vocabulary.setdefault(token, len(vocabulary))
    return vocabulary, [tuple(merge) for merge in model["merges"]]
