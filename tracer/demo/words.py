"""The demo's word lists: nouns, verbs, adjectives, and the 50 US states with seven cities each.

Knows only words. Refuses to know sentences, splits or probabilities; those are in `data`.
"""

from typing import NamedTuple


class Noun(NamedTuple):
    """A noun in its two numbers; its singular is its name in every table."""

    singular: str
    plural: str


class Verb(NamedTuple):
    """A verb in its two third-person forms; its plural form is its name in every table."""

    singular: str
    plural: str


class State(NamedTuple):
    """A US state: its postal code, its capital, and cities whose names are one word each."""

    name: str
    code: str
    capital: str
    cities: tuple[str, ...]


def _nouns(words: str) -> tuple[Noun, ...]:
    """Nouns from a list of `singular` (plural in -s) or `singular/plural`."""
    pairs = (word.partition("/") for word in words.split())
    return tuple(Noun(one, many or one + "s") for one, _, many in pairs)


def _verbs(words: str) -> tuple[Verb, ...]:
    """Verbs from a list of `plural` (singular in -s) or `plural/singular`."""
    pairs = (word.partition("/") for word in words.split())
    return tuple(Verb(one or many + "s", many) for many, _, one in pairs)


PEOPLE = _nouns(
    "parent athlete manager doctor teacher student lawyer farmer driver singer writer painter actor "
    "author banker baker builder clerk cousin dancer friend guard judge king mayor minister officer "
    "pilot player poet queen sailor senator soldier surgeon tailor waiter worker secretary/secretaries "
    "man/men woman/women child/children"
)
THINGS = _nouns(
    "key cabinet car table chair book boat bottle bridge camera candle clock desk door flower garden "
    "house lamp letter mirror piano picture plate ring tower tree truck window bus/buses box/boxes"
)
MAIN_VERBS = _verbs("are/is were/was have/has look seem remain")
CLAUSE_VERBS = _verbs("like know see love hate help trust admire follow visit thank remember")
ADJECTIVES = tuple("old new small famous quiet clean ready strange pretty important".split())
PARTICIPLES = tuple("changed moved arrived vanished".split())
PREPOSITIONS = tuple("near behind beside".split())

_STATES = """
Alabama|AL|Montgomery|Birmingham Mobile Huntsville Tuscaloosa Dothan Gadsden Hoover
Alaska|AK|Juneau|Anchorage Fairbanks Sitka Ketchikan Wasilla Kodiak Nome
Arizona|AZ|Phoenix|Tucson Mesa Scottsdale Tempe Yuma Flagstaff Chandler
Arkansas|AR|Little Rock|Jonesboro Conway Rogers Bentonville Springdale Searcy Paragould
California|CA|Sacramento|Fresno Oakland Anaheim Stockton Bakersfield Berkeley Modesto
Colorado|CO|Denver|Boulder Pueblo Greeley Durango Loveland Aspen Vail
Connecticut|CT|Hartford|Bridgeport Stamford Danbury Norwalk Waterbury Meriden Groton
Delaware|DE|Dover|Wilmington Smyrna Lewes Seaford Rehoboth Harrington Claymont
Florida|FL|Tallahassee|Miami Tampa Orlando Jacksonville Gainesville Pensacola Sarasota
Georgia|GA|Atlanta|Savannah Macon Athens Valdosta Marietta Dalton Brunswick
Hawaii|HI|Honolulu|Hilo Kailua Kahului Waipahu Lahaina Kihei Wahiawa
Idaho|ID|Boise|Nampa Pocatello Meridian Caldwell Rexburg Moscow Sandpoint
Illinois|IL|Springfield|Chicago Peoria Naperville Joliet Evanston Champaign Rockford
Indiana|IN|Indianapolis|Evansville Muncie Gary Kokomo Elkhart Carmel Bloomington
Iowa|IA|Des Moines|Davenport Dubuque Ames Ottumwa Waterloo Ankeny Urbandale
Kansas|KS|Topeka|Wichita Lawrence Olathe Salina Hutchinson Emporia Lenexa
Kentucky|KY|Frankfort|Louisville Lexington Owensboro Paducah Covington Hopkinsville Elizabethtown
Louisiana|LA|Baton Rouge|Shreveport Lafayette Metairie Houma Kenner Slidell Natchitoches
Maine|ME|Augusta|Bangor Lewiston Biddeford Brewer Saco Bath Kennebunk
Maryland|MD|Annapolis|Baltimore Rockville Frederick Bethesda Hagerstown Bowie Cumberland
Massachusetts|MA|Boston|Worcester Cambridge Lowell Brockton Quincy Plymouth Framingham
Michigan|MI|Lansing|Detroit Flint Kalamazoo Dearborn Saginaw Muskegon Livonia
Minnesota|MN|Saint Paul|Minneapolis Duluth Mankato Bemidji Brainerd Moorhead Winona
Mississippi|MS|Jackson|Biloxi Gulfport Hattiesburg Tupelo Natchez Vicksburg Oxford
Missouri|MO|Jefferson City|Independence Joplin Sedalia Rolla Hannibal Branson Florissant
Montana|MT|Helena|Billings Missoula Bozeman Butte Kalispell Havre Whitefish
Nebraska|NE|Lincoln|Omaha Kearney Hastings Scottsbluff Ogallala Papillion Chadron
Nevada|NV|Carson City|Reno Henderson Sparks Elko Laughlin Pahrump Winnemucca
New Hampshire|NH|Concord|Manchester Nashua Keene Portsmouth Laconia Hanover Exeter
New Jersey|NJ|Trenton|Newark Paterson Camden Hoboken Princeton Bayonne Hackensack
New Mexico|NM|Santa Fe|Albuquerque Roswell Taos Gallup Farmington Clovis Alamogordo
New York|NY|Albany|Buffalo Syracuse Rochester Yonkers Utica Ithaca Poughkeepsie
North Carolina|NC|Raleigh|Charlotte Durham Greensboro Asheville Fayetteville Gastonia Hickory
North Dakota|ND|Bismarck|Fargo Minot Williston Dickinson Mandan Jamestown Wahpeton
Ohio|OH|Columbus|Cleveland Cincinnati Toledo Dayton Akron Youngstown Canton
Oklahoma|OK|Oklahoma City|Tulsa Norman Lawton Stillwater Enid Muskogee Ardmore
Oregon|OR|Salem|Portland Eugene Bend Medford Corvallis Gresham Astoria
Pennsylvania|PA|Harrisburg|Philadelphia Pittsburgh Allentown Scranton Erie Bethlehem Altoona
Rhode Island|RI|Providence|Newport Warwick Cranston Pawtucket Woonsocket Westerly Narragansett
South Carolina|SC|Columbia|Greenville Spartanburg Florence Sumter Beaufort Aiken Anderson
South Dakota|SD|Pierre|Deadwood Brookings Aberdeen Yankton Sturgis Spearfish Vermillion
Tennessee|TN|Nashville|Memphis Knoxville Chattanooga Clarksville Murfreesboro Gatlinburg Franklin
Texas|TX|Austin|Dallas Houston Lubbock Amarillo Laredo Galveston Waco
Utah|UT|Salt Lake City|Provo Ogden Moab Logan Orem Sandy Layton
Vermont|VT|Montpelier|Burlington Rutland Bennington Brattleboro Stowe Barre Winooski
Virginia|VA|Richmond|Norfolk Roanoke Alexandria Lynchburg Chesapeake Hampton Arlington
Washington|WA|Olympia|Seattle Tacoma Spokane Bellevue Yakima Everett Redmond
West Virginia|WV|Charleston|Huntington Morgantown Wheeling Parkersburg Beckley Clarksburg Martinsburg
Wisconsin|WI|Madison|Milwaukee Kenosha Racine Oshkosh Appleton Waukesha Sheboygan
Wyoming|WY|Cheyenne|Casper Laramie Gillette Cody Sheridan Riverton Rawlins
"""


def _states(table: str) -> tuple[State, ...]:
    rows = (line.split("|") for line in table.strip().splitlines())
    return tuple(State(name, code, capital, tuple(cities.split())) for name, code, capital, cities in rows)


STATES = _states(_STATES)
