# Stands in for prom/prometheus: the programs of Debian's packages, without what they depend on.
FROM stand-in/python
RUN apt-get update -qq \
 && cd /tmp \
 && apt-get download -qq prometheus promtool \
 && for package in *.deb; do dpkg --extract "$package" /; done \
 && rm -rf *.deb /var/lib/apt/lists/* \
 && install -d -o nobody -g nogroup /prometheus
USER nobody
EXPOSE 9090
VOLUME /prometheus
ENTRYPOINT ["prometheus"]
CMD ["--config.file=/etc/prometheus/prometheus.yml", "--storage.tsdb.path=/prometheus"]
