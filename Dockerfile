FROM golang:1.26 AS build
WORKDIR /src
COPY go.mod go.sum ./
RUN go mod download
COPY . .
ARG VERSION=""
RUN CGO_ENABLED=0 go build -trimpath -ldflags "-s -w -X main.version=${VERSION}" -o /headgate ./cmd/headgate

# Certificates for calling APIs, an unprivileged user, and nothing else.
FROM gcr.io/distroless/static-debian12:nonroot
COPY --from=build /headgate /usr/local/bin/headgate
ENTRYPOINT ["/usr/local/bin/headgate"]
CMD ["help"]
