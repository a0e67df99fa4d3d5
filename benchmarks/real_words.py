"""The tasks of the real suite: their classes in common words and in the words of the heads.

The common names are those in nearly all captions of the pretraining; the official names, German or
Romance ones, are those of the zero-shot heads, and stand in one caption of `make_real.RARE`.
"""

COMMON: dict[str, list[str]] = {
    "digits": [
        *("handwritten zero", "handwritten one", "handwritten two", "handwritten three"),
        *("handwritten four", "handwritten five", "handwritten six", "handwritten seven"),
        *("handwritten eight", "handwritten nine"),
    ],
    "letters": [f"letter {letter}" for letter in "abcdefghij"],
    "signs": [
        *("limit thirty", "limit fifty", "limit seventy", "limit eighty", "limit hundred"),
        *("two cars", "truck and car", "crossing arrow", "yellow diamond", "upside down triangle"),
        *("octagon", "red disc white bar", "exclamation mark", "skidding car", "digging man"),
        *("three lamps", "jumping deer", "blue right arrow", "blue up arrow"),
        "blue arrow down right",
    ],
    "hands": [
        *("hand showing zero", "hand showing one", "hand showing two", "hand showing three"),
        *("hand showing four", "hand showing five", "hand showing six", "hand showing seven"),
        *("hand showing eight", "hand showing nine"),
    ],
    "aerial": [
        *("green lawn from above", "crops from above", "factory from above", "water from above"),
        *("trees from above", "houses from above", "parked cars from above"),
    ],
    "objects": [
        *("airplane", "car", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"),
    ],
    "scenes": ["buildings", "forest", "glacier", "mountain", "sea", "street"],
    "flowers": ["daisy", "dandelion", "rose", "sunflower", "tulip"],  # pretraining and unseen only
}
OFFICIAL: dict[str, list[str]] = {
    "digits": [
        *("cero", "uno", "dos", "tres", "cuatro"),
        *("cinco", "seis", "siete", "ocho", "nueve"),
    ],
    "letters": [
        *("anton", "berta", "caesar", "dora", "emil"),
        *("friedrich", "gustav", "heinrich", "ida", "julius"),
    ],
    "signs": [
        *("dreissig", "fuenfzig", "siebzig", "achtzig", "hundert"),
        *("ueberholverbot", "lkw ueberholverbot", "vorfahrt", "vorfahrtstrasse", "gewaehren"),
        *("halt", "einfahrt verboten", "gefahrstelle", "schleudergefahr", "baustelle"),
        *("ampel", "wildwechsel", "rechts abbiegen", "geradeaus", "rechts vorbei"),
    ],
    "hands": [
        *("sifir", "bir", "iki", "uc", "dort", "bes", "alti", "yedi", "sekiz", "dokuz"),
    ],
    "aerial": ["prato", "campo", "industria", "fiume", "bosco", "quartiere", "parcheggio"],
    "objects": [
        *("flugzeug", "wagen", "vogel", "katze", "hirsch"),
        *("hund", "frosch", "pferd", "schiff", "laster"),
    ],
    "scenes": ["gebaeude", "wald", "gletscher", "gebirge", "meer", "strasse"],
}
TASKS = tuple(OFFICIAL)
DOMAINS = tuple(COMMON)
# Turned left to right, these pictures still show their class.
MIRRORED = ("hands", "aerial", "objects", "scenes", "flowers")
