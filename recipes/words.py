"""Words of the training data: what pictures show, and how questions are worded."""

import re

ALPHABET = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz.,:/-$%"
"""Characters of drawn texts. Higher difficulty levels add them in this order."""
CHART_LABELS = "ABCDEF"

WORDS = tuple(
    """
    able about above actor adult after again agent agree ahead air alarm album alive allow almost alone along always
    amount anchor angle animal answer apple april arm army around arrive arrow art artist ask aunt author autumn away
    baby back bad bag ball banana band bank bar basket beach bean bear beauty bed before begin bell below best better
    bicycle big bird birthday black blanket blue board boat body bone book border bottle bottom box boy branch bread
    break breakfast bridge bright bring brother brown brush bucket build building bus business busy butter button buy
    cable cake call camera camp candle car card careful carry castle cat catch center chair chance change cheese child
    choice church circle city class clean clear clock close cloud coat coffee coin cold color come common computer cook
    cool copper corner cotton count country course cousin cover cow cream crowd cup curtain dance danger dark daughter
    day deep desert desk dinner direction dirty doctor dog dollar door double down dragon drawer dream dress drink drive
    dry duck dust ear early earth east easy edge egg eight elephant empty end energy engine enough evening every exit
    eye face factory fall family famous farm fast father feather february few field film finger fire fish five flag
    floor flower fly follow food foot forest forget fork four fox free fresh friday friend front fruit full game garden
    gate gift girl give glass glove go goat gold good grass gray great green ground group grow guitar hair half hammer
    hand happy harbor hat head health heart heavy hello help here high hill history holiday home honey hope horse hot
    hotel hour house hundred hungry ice idea inside iron island jacket january job join joke juice july jump june
    kettle key king kitchen kite knee knife know ladder lake lamp language large last laugh leaf learn left lemon
    letter library light lion list little long lost love low lucky lunch machine magic map march market match may meal
    measure meat medicine meeting metal middle milk minute mirror monday money month moon morning mother mountain mouse
    mouth movie museum music nail name narrow near neck needle nest never new news night nine north nose notebook
    november number ocean october office oil old one onion open orange order other oven owner page paint paper parent
    park party path pencil people pepper perfect phone photo piano picture pig pillow pilot pink plane planet plant
    plate play pocket point police pond pool potato present price prize purple queen question quick quiet rabbit radio
    rain rainbow read ready red rest rice right ring river road rock roof room root rope rose round run sad safe salt
    sand saturday school science sea season secret seed sell seven shadow sharp sheep ship shirt shoe shop short
    shoulder show silver simple sister six size sky sleep slow small smile smoke snow soap soft song soup south spoon
    spring square stairs stamp star start station stone stop store storm story street strong student sugar summer sun
    sunday sweet swim table tall taxi tea teacher team telephone ten tent thank thick thin three thunder thursday ticket
    tiger time today together tomato tomorrow tower town toy traffic train travel tree triangle truck true tuesday two
    umbrella uncle under valley village violin visit voice wait walk wall warm wash watch water weather wednesday week
    welcome west wheel white wide wild wind window winter wish wolf woman wonder wood word work world write yellow
    yes yesterday young zebra zero
    """.split()
)

GOODS = tuple(
    """
    tea egg jam milk soup rice cake fish salt corn bread apple juice pasta pizza salad sugar honey lemon onion cheese
    coffee butter banana tomato potato yogurt cookie carrot cereal pepper orange chicken sandwich lettuce mushroom
    cucumber chocolate pineapple sausages strawberry soap pen candle towel notebook battery umbrella toothpaste beans
    water beer wine ham oil nuts grapes shampoo magazine
    """.split()
)
"""Items of receipts, each one token of the tokenizer. Higher difficulty levels add them in this order, short first."""

OTHER_GOODS = tuple(
    """
    almonds apricot avocado bacon bagel basil beef biscuit blender broccoli brush bulb burger cabbage cashews celery
    chair charger cherries cherry chips cigar cloth cocoa coconut comb cotton crackers cream cup dates detergent
    diapers donut duck eggs eraser figs flour fork garlic ginger glue grape hammer herbs hummus ketchup kiwi
    knife lamb lamp lime lobster mango margarine marker melon mint mop muffin mug mustard napkins noodles oats
    olives oranges oregano pan papaya paper paprika parsley peach peanuts pear pears peas pencil perfume pie pillow
    plate plum pork pretzel prawns pumpkin quinoa radish raisins razor ribbon ruler salmon salsa sauce scarf
    scissors seeds shirt shrimp socks soda spinach sponge spoon steak stamps syrup tape tofu tomatoes tuna turkey
    vanilla vinegar vodka waffle walnuts whisky yeast zucchini
    """.split()
)
"""More items of receipts; the tokenizer spells these, or starts with one of GOODS and spells the rest."""

WORDINGS: dict[str, tuple[str, ...]] = {
    "text.read": (
        "What does the text say?",
        "Read the text.",
        "What is written in the image?",
        "What text is shown?",
        "Which text can you see?",
        "What does it say?",
        "Read the text in the image.",
        "Transcribe the text.",
    ),
    "receipt.total": (
        "What is the total?",
        "How much is the total?",
        "What is the sum?",
        "What does everything cost together?",
        "What is the total amount?",
        "What is the total price?",
    ),
    "receipt.price": (
        "How much is the {item}?",
        "What does the {item} cost?",
        "What is the price of the {item}?",
        "How much does the {item} cost?",
        "What is the {item} price?",
    ),
    "receipt.count": (
        "How many items are there?",
        "How many items are on the receipt?",
        "How many items were bought?",
        "How many things are listed?",
        "What is the number of items?",
    ),
    "chart.highest": (
        "Which {mark} is the highest?",
        "Which {mark} has the highest value?",
        "What is the highest {mark}?",
        "Which {mark} is the largest?",
        "Which label has the highest value?",
        "Which {mark} is the {tallest}?",
    ),
    "chart.lowest": (
        "Which {mark} is the lowest?",
        "Which {mark} has the lowest value?",
        "What is the lowest {mark}?",
        "Which {mark} is the smallest?",
        "Which label has the lowest value?",
        "Which {mark} is the {shortest}?",
    ),
    "chart.value": (
        "What is the value of {label}?",
        "What value does {label} have?",
        "How much is {label}?",
        "What is the value of {mark} {label}?",
        "Read the value of {label}.",
    ),
    "scene.count": (
        "How many {things} are there?",
        "How many {things} can you see?",
        "How many {things} are in the image?",
        "Count the {things}.",
        "What is the number of {things}?",
    ),
    "scene.color": (
        "What color is the {kind}?",
        "What is the color of the {kind}?",
        "Which color is the {kind}?",
        "Which color does the {kind} have?",
        "What colour is the {kind}?",
    ),
    "scene.exists": (
        "Is there {a_thing}?",
        "Is there {a_thing} in the image?",
        "Can you see {a_thing}?",
        "Does the image show {a_thing}?",
        "Does the picture contain {a_thing}?",
    ),
    "grounding.box": (
        "Where is the {thing}?",
        "Find the {thing}.",
        "Locate the {thing}.",
        "Give the bounding box of the {thing}.",
        "Where can you see the {thing}?",
    ),
    "two_images.more": (
        "Which image has more {things}?",
        "Which image shows more {things}?",
        "In which image are there more {things}?",
        "Which picture has more {things}?",
        "Which image has more {things}: first, second or same?",
    ),
    "two_images.both": (
        "Do both images show {a_thing}?",
        "Is there {a_thing} in both images?",
        "Do both images have {a_thing}?",
        "Can you see {a_thing} in both images?",
        "Do both pictures contain {a_thing}?",
    ),
    "text_only.arithmetic": (
        "What is {sum}?",
        "{sum}?",
        "Calculate {sum}.",
        "How much is {sum}?",
        "Compute {sum}.",
        "{sum} =",
        "What is the result of {sum}?",
    ),
    "describe.lines": ("Read all lines.", "What do the lines say?", "Transcribe every line."),
    "describe.receipt": ("Read the receipt.", "What is on the receipt?", "Transcribe the receipt."),
    "describe.chart": ("List the values.", "What are the values?", "Read the chart."),
    "describe.scene": ("List the shapes.", "What shapes are there?", "Which shapes can you see?"),
    "pretrain_text.copy": ("Repeat: {text}", "Copy: {text}", "Say: {text}", "Write: {text}", "Repeat this: {text}"),
}
"""How to ask each kind of question; level 0 uses the first wording only. Braces are filled in by the question."""

_WORDS_OF_QUESTIONS = set(re.findall(r"\w+", " ".join(text for variants in WORDINGS.values() for text in variants)))
OTHER_NAMES = tuple(word for word in WORDS if word not in GOODS and word not in _WORDS_OF_QUESTIONS)
"""Words that can name an item of a receipt without making the question ambiguous."""
