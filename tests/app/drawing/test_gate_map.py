"""AutoLoRA's gates drawn from the notes."""

from app.drawing import gate_map

NOTES = {"autolora": {"kind": "rank", "steps": [
    {"step": 0, "loras": ["fox", "ink"], "gates": {"down.0.a": [1.0, 0.0], "up.1.b": [0.5, 1.0]}},
    {"step": 3, "loras": ["fox", "ink"], "gates": {"down.0.a": [2.0, 0.25], "up.1.b": [1.0, 1.0], "other": [1.0]}}]}}


def test_a_cell_has_the_colour_of_its_gate():
    sheet = gate_map.heat_map(NOTES)
    half, quarter = gate_map.WIDE // 4, gate_map.WIDE * 3 // 4
    top, ink = gate_map.TOP + 1, gate_map.LEFT + gate_map.WIDE + gate_map.GAP
    assert sheet.getpixel((gate_map.LEFT + half, top)) == (255, 255, 255)
    assert sheet.getpixel((gate_map.LEFT + quarter, top)) == gate_map.MORE == gate_map.colour(2.0)
    assert sheet.getpixel((ink + half, top)) == gate_map.LESS == gate_map.colour(0.0)
    assert sheet.getpixel((ink + quarter, top)) == gate_map.colour(0.25)
    assert sheet.getpixel((gate_map.LEFT + half, top + gate_map.height(3))) == gate_map.colour(0.5)
    assert sheet.getpixel((gate_map.LEFT + half, top + 2 * gate_map.height(3))) == (238, 238, 238), "no gate of as many LoRAs"


def test_notes_without_gates_have_no_map():
    assert gate_map.heat_map({}) is None and gate_map.heat_map({"autolora": "?"}) is None and gate_map.heat_map({"autolora": {"steps": []}}) is None
