"""Serve the demo page of one model, with the files of cm_diffusers in this folder."""

from cm_diffusers.demo import load_page


demo = load_page("MODEL")

if __name__ == "__main__":
    demo.launch(show_error=True)
