"""Captions with the content and lengths of web captions: most of 5 to 15 words, a few much longer."""

CAPTIONS = """a dog running on the beach
sunset over the lake
portrait of a young woman in the autumn park
vintage car parked in front of an old brick building
the new stadium is seen from the air ahead of the opening match
illustration of a cat sleeping on a pile of books
fresh vegetables on a wooden table
a man in a blue suit speaks into a microphone during a press conference at the city hall while journalists take notes in the front row
snow-covered mountains
interior of a modern kitchen with white cabinets and a large window
footballer celebrates with team mates after scoring the second goal
seamless pattern with colorful flowers and leaves on a dark background
children play in the fountain on a hot summer day
the bridge at night, with the lights of the city reflected in the river
close up of a bee on a yellow flower
a bowl of soup with bread
actor attends the premiere of his new film at the festival
how to build a bookshelf from old crates: step one is to sand the boards, step two to paint them, and step three to screw them \
together before you hang the whole thing on the wall of your living room
red double-decker bus driving through the center of the city
birthday cake with candles
tourists walk along the narrow streets of the old town
a herd of elephants crossing the river at dawn
black and white photograph of a steam train leaving the station in winter
hand holding a smartphone with a blank screen, isolated on white
woman doing yoga on a rock overlooking the ocean
map of the region
the kitchen of the flat, which was renovated last year, opens onto a small balcony with a view of the gardens
a boy flies a kite in a field of tall grass
fishing boats in the harbour on a foggy morning
antique silver ring with a green stone
a group of friends having dinner outdoors under string lights
my favorite pair of shoes""".replace("\\\n", "").splitlines()
