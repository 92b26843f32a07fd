"""The scores of a picture that methods are compared by, as columns of tables."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Metric:
    """A column of the report. larger: whether more is better. share: shown in percent. about: what it says, in one line. section: the table of
    the report that has it, "" for the first."""

    key: str
    title: str
    about: str
    larger: bool = True
    share: bool = False
    digits: int = 2
    section: str = ""


DISTRACTORS, CONTENT_STYLE, CHOICE = "distractors", "content-style", "choice"  # sections
METRICS = (
    Metric("presence", "Presence", "share of the concepts asked for that the judge finds", share=True, digits=1),
    Metric("all_present", "All present", "share of pictures in which every concept is found", share=True, digits=1),
    Metric("clipscore", "CLIPScore", "agreement of the picture with the whole prompt"),
    Metric("concept", "CLIP-T", "mean over concepts of 100 * cosine with the concept's own phrase"),
    Metric("concept_min", "CLIP-T, least", "the same of the concept that agrees least: a lost concept shows here"),
    Metric("clip_i", "CLIP-I", "100 * cosine with pictures by each LoRA alone, mean over the LoRAs"),
    Metric("clip_i_min", "CLIP-I, least", "the same of the LoRA that is least alike"),
    Metric("leakage", "Leakage", "share of pictures with one thing twice and another not at all", larger=False, share=True, digits=1),
    Metric("distractor_presence", "Distractors present", "share of the distractors, which the prompt does not name, that the judge finds",
           larger=False, share=True, digits=1, section=DISTRACTORS),
    Metric("harmonic_presence", "Harmonic, presence", "harmonic mean of a picture's content presence and style presence", share=True, digits=1,
           section=CONTENT_STYLE),
    Metric("harmonic_clip_t", "Harmonic, CLIP-T", "harmonic mean of a picture's CLIP-T of content and of style", section=CONTENT_STYLE),
    Metric("harmonic_clip_i", "Harmonic, CLIP-I", "harmonic mean of a picture's CLIP-I of content and of style", section=CONTENT_STYLE),
    Metric("evaluations", "Evaluations", "denoiser evaluations a picture", larger=False, digits=1),
    Metric("seconds", "Seconds", "seconds a picture, loading left out", larger=False),
)  # fmt: skip
COSTS = ("evaluations", "seconds")  # those that are no scores
