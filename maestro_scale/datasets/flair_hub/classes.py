"""Class names of FLAIR-HUB's labels, indexed by stored value."""

COSIA = (
    "building", "greenhouse", "swimming pool", "impervious surface", "pervious surface", "bare soil", "water", "snow",
    "herbaceous vegetation", "agricultural land", "plowed land", "vineyard", "deciduous", "coniferous", "brushwood",
    "clear cut", "ligneous", "mixed", "undefined",
)  # fmt: skip
COSIA_IGNORED = (15, 16, 17, 18)
FLAIR2_IGNORED = (1, 2, 7, *COSIA_IGNORED)

LPIS_1 = (
    "grasses", "wheat", "barley", "maize", "other cereals", "rice", "flax/hemp/tobacco", "sunflower", "rapeseed",
    "other oilseed crops", "soy", "other protein crops", "fodder legumes", "beetroots", "potatoes",
    "other arable crops", "vineyard", "olive groves", "fruit orchards", "nut orchards", "other permanent crops",
    "mixed crops", "background",
)  # fmt: skip
LPIS_2 = (
    "grasses", "wheat", "barley", "maize", "sorghum/millet", "other winter cereals", "other spring cereals",
    "other cereals", "rice", "hemp/tobacco", "flax", "sunflower", "rapeseed", "other oilseed crops", "soy",
    "other protein crops", "alfalfa", "other fodder legumes", "beetroots", "potatoes", "fruits and vegetables",
    "aromatic/medicinal plants", "other arable crops", "vineyard", "olive groves", "fruit orchards", "nut orchards",
    "lavandin", "other permanent crops", "mixed crops", "background",
)  # fmt: skip
LPIS_3 = (
    "grasses monoculture", "grasses mixture", "winter wheat", "spring wheat", "winter barley", "spring barley",
    "maize", "sorghum", "millet/foxtail millet", "winter durum wheat", "winter triticale", "winter oat",
    "winter rye", "spring oat", "other spring cereals", "other cereals", "rice", "hemp/tobacco", "fiber flax",
    "other flax", "sunflower", "rapeseed", "mustard", "other oilseed crops", "soy", "spring peas",
    "winter protein crops", "other protein crops", "alfalfa", "clover", "other fodder legumes", "beetroots",
    "potatoes", "fruits and vegetables", "aromatic/medicinal plants", "buckwheat", "other arable crops", "vineyard",
    "olive groves", "fruit orchards", "nut orchards", "lavandin", "berries", "other permanent crops", "mixed crops",
    "background",
)  # fmt: skip
