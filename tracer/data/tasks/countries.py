"""Countries and their capitals, with two shots before the country that is asked about.

Knows countries whose capital is one word and not in dispute. Refuses to know models beyond a tokenizer.
"""

from __future__ import annotations

from tracer.data.tasks.pairs import Item, Pair, drawn, of_split
from tracer.prompts import Vocabulary

SHOTS = {"France": "Paris", "Japan": "Tokyo"}
"""Shown before every country, and never asked about."""

_TABLE = """
Afghanistan Kabul
Albania Tirana
Algeria Algiers
Angola Luanda
Armenia Yerevan
Australia Canberra
Austria Vienna
Azerbaijan Baku
Bahrain Manama
Bangladesh Dhaka
Belarus Minsk
Belgium Brussels
Bhutan Thimphu
Botswana Gaborone
Bulgaria Sofia
Canada Ottawa
Chile Santiago
China Beijing
Croatia Zagreb
Cuba Havana
Cyprus Nicosia
Denmark Copenhagen
Ecuador Quito
Egypt Cairo
England London
Eritrea Asmara
Estonia Tallinn
Fiji Suva
Finland Helsinki
Gabon Libreville
Georgia Tbilisi
Germany Berlin
Ghana Accra
Greece Athens
Guinea Conakry
Honduras Tegucigalpa
Hungary Budapest
Iceland Reykjavik
Iran Tehran
Iraq Baghdad
Ireland Dublin
Italy Rome
Jamaica Kingston
Jordan Amman
Kazakhstan Astana
Kenya Nairobi
Kyrgyzstan Bishkek
Laos Vientiane
Latvia Riga
Lebanon Beirut
Liberia Monrovia
Libya Tripoli
Lithuania Vilnius
Madagascar Antananarivo
Malawi Lilongwe
Mali Bamako
Malta Valletta
Morocco Rabat
Mozambique Maputo
Namibia Windhoek
Nepal Kathmandu
Netherlands Amsterdam
Nicaragua Managua
Niger Niamey
Nigeria Abuja
Norway Oslo
Oman Muscat
Pakistan Islamabad
Peru Lima
Philippines Manila
Poland Warsaw
Portugal Lisbon
Qatar Doha
Romania Bucharest
Russia Moscow
Rwanda Kigali
Scotland Edinburgh
Senegal Dakar
Serbia Belgrade
Slovakia Bratislava
Slovenia Ljubljana
Somalia Mogadishu
Spain Madrid
Sudan Khartoum
Sweden Stockholm
Switzerland Bern
Syria Damascus
Taiwan Taipei
Tajikistan Dushanbe
Thailand Bangkok
Tunisia Tunis
Turkey Ankara
Turkmenistan Ashgabat
Uganda Kampala
Uruguay Montevideo
Uzbekistan Tashkent
Venezuela Caracas
Vietnam Hanoi
Wales Cardiff
Zambia Lusaka
Zimbabwe Harare
"""
CAPITALS = {country: capital for country, _, capital in (line.partition(" ") for line in _TABLE.split("\n") if line)}
"""Capitals by country. Left out: capitals of several words, written in several ways, or in dispute."""


def items(split: str) -> list[Item]:
    """The countries of a split, a third of them test, each on a line of its own after those of the shots: ``Italy:``.

    Raises:
        JobError: an unknown split.
    """
    shots = "".join(f"{country}: {capital}\n" for country, capital in SHOTS.items())
    chosen = of_split(split, list(CAPITALS.items()), "countries")
    return [
        Item(country, f"{shots}{country}:", f" {capital}", {"country": country, "capital": capital})
        for country, capital in chosen
    ]


def pairs(split: str, count: int, seed: int = 0, *, vocabulary: Vocabulary | None = None) -> list[Pair]:
    """`count` different pairs of countries: the counterfactual asks about another, whose capital is the foil.

    Args:
        split: ``train`` or ``test``; both countries of a pair are of the split.
        vocabulary: as of `pairs.drawn`.

    Raises:
        JobError: an unknown split, or as `pairs.drawn`.
    """
    return drawn("countries", split, items(split), count, seed, vocabulary)
