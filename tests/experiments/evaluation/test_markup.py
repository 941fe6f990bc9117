from hypothesis import given
from hypothesis import strategies as st

from experiments.evaluation.markup import Markup, element, image, join, table


@given(st.text())
def test_text_never_opens_a_tag_or_closes_an_attribute(text):
    inside = element("p", text, title=text)
    assert inside.count("<") == inside.count(">") == 2
    assert inside.count('"') == 2


def test_elements():
    assert element("p", "a < b", element("b", 1)) == "<p>a &lt; b<b>1</b></p>"
    assert element("a", class_="x", aria_label="y", hidden=True, id=None) == '<a class="x" aria-label="y" hidden></a>'
    assert join("&", Markup("&amp;")) == "&amp;&amp;"


def test_images_lie_in_the_page():
    assert image(b"PNG", 'a "plot"') == '<img src="data:image/png;base64,UE5H" alt="a &quot;plot&quot;">'


def test_tables_name_rows_and_columns():
    text = table(["layer", "bits"], [["a", 4]], caption="Layers")
    assert '<th scope="col">bits</th>' in text
    assert '<th scope="row">a</th><td>4</td>' in text
    assert "<caption>Layers</caption>" in text
