# rcgrpo with a GPU:    docker build -t rcgrpo .
#                       docker run --gpus all --user "$(id -u)" -v "$PWD/runs:/runs" rcgrpo train --output_dir /runs/first ...
# Make the folder runs first: what Docker makes belongs to root. Without a GPU:
#   docker build --build-arg TORCH="torch torchvision --index-url URL" -t rcgrpo .    # URL: docs/installing.md
FROM python:3.12-slim
ARG TORCH="torch torchvision"
RUN useradd --create-home rcgrpo && mkdir /runs && chown rcgrpo /runs
WORKDIR /home/rcgrpo/source
RUN pip install --no-cache-dir ${TORCH}
COPY . .
RUN pip install --no-cache-dir '.[app,serve,tiny]'
USER rcgrpo
WORKDIR /runs
ENV HOME=/runs HF_HOME=/runs/.cache/huggingface
ENTRYPOINT ["rcgrpo"]
CMD ["train", "--output_dir", "/runs/rcgrpo-output"]
