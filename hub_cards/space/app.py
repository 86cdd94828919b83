"""The page of one model, by the files of cm_diffusers beside this one."""

from cm_diffusers.demo import load_page


demo = load_page("MODEL")

if __name__ == "__main__":
    demo.launch(show_error=True)
