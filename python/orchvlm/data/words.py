"""The words for which the built-in tokenizer has a token each."""

# As a text or an answer begins.
_FIRST = """
    What How Which Where Who Is Are Does Name List Describe Point Box Click Odd There The
    red green blue yellow purple orange black grey white circle square triangle cross star
    zero one two three four five six seven eight nine true false yes no a the
""".split()

# Behind a space, which is part of the token.
_NEXT = """
    the a an of and in on at to is are it its this that with for there from by as or not be was
    many much do does say says all any each only than more most least exactly same different
    left right top bottom above below small large first last open close
    red green blue yellow purple orange black grey white
    circle square triangle cross star circles squares triangles crosses stars
    zero one two three four five six seven eight nine
    shape shapes colour picture bar highest high row column out cell number
    box boxes item items object objects tower block blocks touching edge side wall corner
    face faces eye eyes head hand hands hair skin tone mouth smiling light medium dark
    man woman girl boy person people family heart cat dog flag sign button clock symbol arrow
    letter moon sun tree flower car house food hat water bird fish mark paper
    screen window dialog menu screenshot showing page text file list table data new search
    settings selected True false
    Save Open Close Print Back Next Help Send Copy Paste Undo Login Delete Share Search Play Stop
    Edit Add Cancel
""".split()

#: In the order of their ids.
WORDS = (*_FIRST, *(f" {word}" for word in _NEXT))
