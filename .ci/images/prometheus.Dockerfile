# Stands in for prom/prometheus, out of Debian's package.
FROM stand-in/python
RUN apt-get update -qq \
 && apt-get install -y -qq --no-install-recommends prometheus >/dev/null \
 && ln -s /usr/bin/prometheus /usr/bin/promtool /bin/ 2>/dev/null; rm -rf /var/lib/apt/lists \
 && install -d -o nobody -g nogroup /prometheus /etc/prometheus
USER nobody
EXPOSE 9090
VOLUME /prometheus
ENTRYPOINT ["/bin/prometheus"]
CMD ["--config.file=/etc/prometheus/prometheus.yml", "--storage.tsdb.path=/prometheus"]
