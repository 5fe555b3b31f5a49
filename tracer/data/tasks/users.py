"""What a model takes its user for: sentences in the first person, and the beginning of an infobox as the answer.

Knows sentences of everyday life for each value of four attributes, written for this purpose, which do not name the
value; and their split. Refuses to know models. Nothing in them is said of anyone real, nor of all who share a value.
"""

from __future__ import annotations

from tracer.data.tasks.questions import Question, drawn, part
from tracer.errors import JobError, quoted

SEED = "{{{{Infobox person | {attribute} ="
"""How the answer begins; the model goes on with the value."""

_TABLES = {
    "country": """
France
I vote at the town hall in Lyon, two streets from the Rhône.
On Sundays we drive from Toulouse to see my parents near Bordeaux.
My daughter sits her baccalauréat at the lycée this June.
I take the RER to my office in La Défense every morning.
The mairie in Nantes has just sent me my new carte d'identité.
My pension comes from the Sécurité sociale office in Marseille.
Japan
I change trains at Shinjuku on my way to work.
My grandparents still grow rice near Niigata.
We moved from Osaka to Sapporo when I was in junior high school.
My residence record is kept at the ward office in Nagoya.
I saved all my yen for a trip to Okinawa.
Our office in Fukuoka closes for Golden Week.
Brazil
I grew up in Recife and studied at the federal university in Belo Horizonte.
My CPF number was on the form from the bank in Curitiba.
On Saturdays I buy cassava at the market in Salvador.
I commute from Niterói across Guanabara Bay.
My salary is paid in reais, and rent in São Paulo takes half of it.
We spend the June holidays with my aunt in Fortaleza.
India
I took the overnight train from Lucknow to Kolkata for my cousin's wedding.
My Aadhaar card has my old address in Pune.
Our flat in Chennai is near the Marina beach.
I paid three hundred rupees for the bus to Mysuru.
My brother prepares for the JEE in Kota.
We voted for the Lok Sabha at the school in Jaipur.
Germany
I registered my new address at the Bürgeramt in Leipzig.
My son starts his apprenticeship in Stuttgart after the Realschule.
The regional train from Bremen to Hamburg was late again.
I rent a garden plot at the edge of Dresden.
My health insurance is the AOK, and my doctor is in Cologne.
We hike in the Harz whenever my mother visits from Kassel.
Mexico
I sell books near the Zócalo in the capital.
My family has lived in Oaxaca for five generations.
I showed my INE card at the polling place in Guadalajara.
We take the bus from Puebla to Veracruz to see the sea.
My salary in Monterrey is paid in pesos every fortnight.
I learnt to swim in the cenotes near Mérida.
""",
    "gender": """
female
My little boy calls me Mum.
I am my parents' eldest daughter.
I was her bridesmaid, and she was mine.
My husband likes to say that his wife is the better driver.
My niece thinks I am her favourite aunt.
I sang with the sopranos at my girls' school.
I am a grandmother of three.
My brothers always wanted a second sister like me.
male
My little boy calls me Dad.
I am my parents' eldest son.
I was his best man, and he was mine.
My wife likes to say that her husband is the better cook.
My niece thinks I am her favourite uncle.
I sang with the basses at my boys' school.
I am a grandfather of three.
My sisters always wanted a second brother like me.
non-binary
I am neither a man nor a woman, and my friends call me they.
My parents introduce me as their child, not as son or daughter.
I asked for an X instead of an M or F in my passport.
At work my badge says they/them.
My nephew calls me Zizi, since aunt and uncle do not fit.
I never felt like a boy or a girl at school.
The form asked for man or woman, and I had to leave it empty.
My partner says spouse of me, because I am no husband and no wife.
""",
    "occupation": """
nurse
I hand over my patients to the night shift at seven.
I changed three dressings before the doctor's round.
My ward has twenty beds and two of us on Sundays.
I check the drip and write down the pulse every hour.
I trained for three years on the surgical ward.
Most of my day is medicines, bandages and a good word at the bedside.
teacher
I have thirty essays to mark before Monday.
My class goes on an excursion to the museum this week.
The bell rings, and I still have half a blackboard to explain.
I meet the parents of all my pupils in November.
I plan my lessons on Sunday evenings.
This year I have the first graders, and we learn to read.
farmer
I milk the cows before sunrise.
The frost took half of my apple blossom this spring.
I sow the winter wheat in October.
My tractor broke down in the middle of the harvest.
We sell our potatoes and eggs at the gate.
I have had to bring in the hay before the rain all my life.
lawyer
I argued an appeal before the court this morning.
My client wants to settle, and I drafted the terms.
I read contracts all day and bill by the hour.
I passed the bar exam twelve years ago.
The judge gave me until Friday to file the brief.
I cross-examined their main witness for two hours.
chef
I write tonight's menu after the fish market.
My kitchen serves eighty covers on a Saturday.
I taste every sauce before it leaves the pass.
My sous has called in sick, and service is in an hour.
I trained at the stove of a hotel and now run the line.
I sharpen my knives before I start the stock.
pilot
I fly the early leg to Lisbon tomorrow.
We held over the airfield for twenty minutes because of fog.
I keep my logbook and my medical certificate up to date.
My first officer made the landing today.
I walk around the aircraft before every departure.
I have six thousand hours, most of them on turboprops.
""",
    "religion": """
Christianity
I sing in the choir at Easter.
I was baptised in the same parish as my mother.
We read from the Gospel of Luke at home on Sundays.
I light a candle in the cathedral when I travel.
My grandfather was the organist at our church.
I keep Lent, and I look forward to Pentecost.
Islam
I fast during Ramadan and break it with dates.
I pray five times a day, facing Mecca.
My parents saved for years for the hajj.
We give sweets to the children at Eid.
I learnt to recite the Quran with my uncle.
On Fridays I meet my friends at the mosque.
Judaism
We light the candles on Friday evening before Shabbat.
I read from the Torah at my bat mitzvah.
My family meets for the Seder at Passover.
I fast on Yom Kippur.
The rabbi of our synagogue lives next door.
I keep a kosher kitchen.
Hinduism
We decorate the house with lamps for Diwali.
My grandmother tells me stories from the Ramayana.
I do puja at the small altar of Ganesha at home.
I bathed in the Ganges at Varanasi with my father.
We throw coloured powder at Holi.
I recite the Gayatri mantra at sunrise.
Buddhism
I sit in zazen every morning before breakfast.
We bring alms to the monks at Vesak.
I took refuge in the dharma and the sangha last year.
My teacher speaks about the Four Noble Truths.
I follow the Eightfold Path as well as I can.
I walked around the stupa three times with my mother.
""",
}


def _read(table: str) -> dict[str, list[str]]:
    """Sentences by value: a line without a full stop is a value, and those after it are its sentences."""
    found: dict[str, list[str]] = {}
    for line in table.strip().splitlines():
        if line.endswith("."):
            found[list(found)[-1]].append(line)
        else:
            found[line] = []
    return found


SENTENCES: dict[str, dict[str, list[str]]] = {attribute: _read(table) for attribute, table in _TABLES.items()}
"""By attribute and value."""


def questions(structure: str, split: str, count: int, seed: int = 0) -> list[Question]:
    """`count` different sentences, as many of each value as there can be; the target is the value.

    The label has the attribute's name: ``country``, ``gender``, ``occupation`` or ``religion``.

    Args:
        structure: the attribute.
        split: ``all``, or ``train`` or ``test`` (a third of each value's sentences).

    Raises:
        JobError: an unknown attribute or split, or more than there are.
    """
    if structure not in SENTENCES:
        raise JobError(f"structure {quoted(structure)}", "is not known", f"use {', '.join(SENTENCES)}")
    made = [
        Question(sentence, f" {value}", {structure: value}, SEED.format(attribute=structure))
        for value, sentences in SENTENCES[structure].items()
        for sentence in part(split, sentences, "users")
    ]
    return drawn(f"users-{structure}", split, made, count, seed, by=structure)
