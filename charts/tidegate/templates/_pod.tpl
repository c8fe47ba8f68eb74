{{/* What all pods of the chart have in common. */}}

{{/* The release's name, with the chart's name in it once. */}}
{{- define "tidegate.fullname" -}}
{{- if contains "tidegate" .Release.Name }}{{ .Release.Name }}{{ else }}{{ .Release.Name }}-tidegate{{ end }}
{{- end }}

{{/*
Name of a component's objects. Argument: dict root, component.
Kubernetes puts a hash behind the name of a StatefulSet and makes a label of at most 63 characters of both.
*/}}
{{- define "tidegate.name" -}}
{{- $name := printf "%s-%s" (include "tidegate.fullname" .root) .component }}
{{- if gt (len $name) 52 }}{{ fail (printf "%q has %d characters, at most 52 fit: choose a shorter release name (or pool name)" $name (len $name)) }}{{ end }}
{{- $name }}
{{- end }}

{{/* Labels that never change for a component. Argument: dict root, component. */}}
{{- define "tidegate.selector" -}}
app.kubernetes.io/name: tidegate
app.kubernetes.io/instance: {{ .root.Release.Name }}
app.kubernetes.io/component: {{ .component }}
{{- end }}

{{/* Argument: dict root, component. */}}
{{- define "tidegate.labels" -}}
{{ include "tidegate.selector" . }}
app.kubernetes.io/version: {{ .root.Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .root.Release.Service }}
helm.sh/chart: {{ .root.Chart.Name }}-{{ .root.Chart.Version }}
{{- end }}

{{/* Argument: dict root, image (what a pool sets of it; may be empty). */}}
{{- define "tidegate.image" -}}
{{- $given := .image | default dict }}
{{- $default := .root.Values.image }}
{{- $repository := $given.repository | default $default.repository }}
{{- /* A pool with a repository of its own does not inherit another image's tag or digest. */}}
{{- $tag := $given.tag | default (ternary "" ($default.tag | default .root.Chart.AppVersion) (hasKey $given "repository")) }}
{{- $digest := $given.digest | default (ternary "" $default.digest (or (hasKey $given "repository") (hasKey $given "tag"))) }}
{{- $repository }}{{ with $tag }}:{{ . }}{{ end }}{{ with $digest }}@{{ . }}{{ end }}
{{- end }}

{{/*
The spec of a pod, restricted as the Pod Security Standard of that name demands, and with a read-only root file system.
Argument: dict root, component, args (of the command `tidegate`), and optionally
  command    list, instead of `tidegate` and args: a pod that waits for people's commands
  service    values of the service: env, envFromSecrets, image, resources, terminationGracePeriodSeconds
  grace      seconds, instead of the service's terminationGracePeriodSeconds
  stateful   true for a pod of a StatefulSet
  variables  list of entries for the container's environment
  http       port of an HTTP server of the service's own, besides that of health and metrics
  role       whose Kafka credentials it has: a key of `kafka.secrets`, or the name of an existing secret as `secret`
  data       name of the volume to be mounted at /var/lib/tidegate
  volumes    list of volumes besides /tmp
  httpName   that port's name, if not `http`
  tool       true for what is not one of our services: it has no health endpoint, and is ready when its port answers
  noSecret   true for a pod that gets no Kafka credentials
  once       true for a pod that ends by itself
  restart    what such a pod does when it failed; Never if not given, so that each try's log stays
  account    name of the service account whose token it gets; other pods get no token
*/}}
{{- define "tidegate.pod" -}}
{{- $values := .root.Values }}
{{- $service := .service | default dict -}}
automountServiceAccountToken: {{ not (empty .account) }}
enableServiceLinks: false
{{- with .account | default $values.serviceAccountName }}
serviceAccountName: {{ . }}
{{- end }}
{{- with $values.imagePullSecrets }}
imagePullSecrets:
  {{- range . }}
  - name: {{ . }}
  {{- end }}
{{- end }}
{{- if .once }}
restartPolicy: {{ .restart | default "Never" }}
{{- else }}
terminationGracePeriodSeconds: {{ .grace | default $service.terminationGracePeriodSeconds | int }}
topologySpreadConstraints:
  {{- range list "topology.kubernetes.io/zone" "kubernetes.io/hostname" }}
  - maxSkew: 1
    topologyKey: {{ . }}
    whenUnsatisfiable: {{ $values.scheduling.spread }}
    labelSelector:
      matchLabels:
        {{- include "tidegate.selector" $ | nindent 8 }}
  {{- end }}
{{- end }}
{{- with $values.scheduling.priorityClassName }}
priorityClassName: {{ . }}
{{- end }}
{{- with $service.nodeSelector | default $values.scheduling.nodeSelector }}
nodeSelector:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with $service.tolerations | default $values.scheduling.tolerations }}
tolerations:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with $values.scheduling.affinity }}
affinity:
  {{- toYaml . | nindent 2 }}
{{- end }}
securityContext:
  runAsNonRoot: true
  runAsUser: 10001
  runAsGroup: 10001
  fsGroup: 10001
  fsGroupChangePolicy: OnRootMismatch
  seccompProfile:
    type: RuntimeDefault
containers:
  - name: tidegate
    image: {{ include "tidegate.image" (dict "root" .root "image" $service.image) | quote }}
    imagePullPolicy: {{ $values.image.pullPolicy }}
    command: {{ .command | default (list "tidegate") | toJson }}
    {{- with .args }}
    args: {{ toJson . }}
    {{- end }}
    env:
      {{- include "tidegate.env" . | nindent 6 }}
    {{- with $service.envFromSecrets }}
    envFrom:
      {{- range . }}
      - secretRef:
          name: {{ . }}
      {{- end }}
    {{- end }}
    {{- $isService := not (or .once .tool .command) }}
    {{- if or .http (and $isService $values.health.enabled) }}
    ports:
      {{- with .http }}
      - name: {{ $.httpName | default "http" }}
        containerPort: {{ . }}
      {{- end }}
      {{- if and $isService $values.health.enabled }}
      - name: health
        containerPort: {{ $values.health.port | int }}
      {{- end }}
    {{- end }}
    {{- if .tool }}
    readinessProbe:
      tcpSocket: {port: {{ .httpName }}}
      periodSeconds: 2
    {{- end }}
    {{- if and $isService $values.health.enabled }}
    # A process that waits for its broker lives. Only a loop that hangs is a reason to kill it; that its state is not
    # restored yet is one to wait.
    startupProbe:
      httpGet: {path: /health/live, port: health}
      periodSeconds: 2
      timeoutSeconds: 3
      failureThreshold: 60
    livenessProbe:
      httpGet: {path: /health/live, port: health}
      periodSeconds: 10
      timeoutSeconds: 5
      failureThreshold: 3
    readinessProbe:
      httpGet: {path: /health/ready, port: health}
      periodSeconds: 3
      timeoutSeconds: 3
    {{- end }}
    resources:
      {{- toYaml ($service.resources | default (dict "requests" (dict "cpu" "50m" "memory" "128Mi") "limits" (dict "memory" "512Mi"))) | nindent 6 }}
    securityContext:
      allowPrivilegeEscalation: false
      readOnlyRootFilesystem: true
      capabilities:
        drop: [ALL]
    volumeMounts:
      - name: tmp
        mountPath: /tmp
      {{- if $values.kafka.caSecret }}
      - name: kafka-ca
        mountPath: /etc/tidegate/kafka-ca
        readOnly: true
      {{- end }}
      {{- if include "tidegate.kafkaSecret" . }}
      - name: kafka-credentials
        mountPath: /etc/tidegate/kafka
        readOnly: true
      {{- end }}
      {{- with .data }}
      - name: {{ . }}
        mountPath: /var/lib/tidegate
      {{- end }}
volumes:
  - name: tmp
    emptyDir: {}
  {{- with $values.kafka.caSecret }}
  - name: kafka-ca
    secret:
      secretName: {{ . }}
      items:
        - {key: {{ $values.kafka.caKey }}, path: ca.crt}
  {{- end }}
  {{- with include "tidegate.kafkaSecret" . }}
  # As files, not as variables: a variable is in every crash dump and every child process.
  - name: kafka-credentials
    secret:
      secretName: {{ . }}
      defaultMode: 0440
      items:
        {{- range $variable, $key := fromYaml (include "tidegate.secretKeys" $) }}
        - {key: {{ $key }}, path: {{ $variable }}}
        {{- end }}
  {{- end }}
  {{- with .volumes }}
  {{- toYaml . | nindent 2 }}
  {{- end }}
{{- end }}

{{/* Environment of the container of `tidegate.pod`, which see. A service's `env` wins over the `env` of all. */}}
{{- define "tidegate.env" -}}
{{- $values := .root.Values -}}
- name: HOME
  value: /tmp
- name: TIDEGATE_DATA_DIR
  value: {{ ternary "/var/lib/tidegate" "/tmp/tidegate" (hasKey . "data") }}
- name: TIDEGATE_KAFKA_BOOTSTRAP
  value: {{ include "tidegate.bootstrap" .root | quote }}
- name: TIDEGATE_KAFKA_TOPIC_PREFIX
  value: {{ $values.kafka.topicPrefix | quote }}
- name: TIDEGATE_KAFKA_SECURITY_PROTOCOL
  value: {{ $values.kafka.securityProtocol }}
{{- with $values.kafka.saslMechanism }}
- name: TIDEGATE_KAFKA_SASL_MECHANISM
  value: {{ . }}
{{- end }}
{{- if include "tidegate.kafkaSecret" . }}
{{- range $variable, $_ := fromYaml (include "tidegate.secretKeys" .) }}
- name: TIDEGATE_KAFKA_{{ $variable }}_{{ if has $variable (list "SSL_CERTIFICATE" "SSL_KEY") }}LOCATION{{ else }}FILE{{ end }}
  value: /etc/tidegate/kafka/{{ $variable }}
{{- end }}
{{- end }}
{{- if and (eq .root.Values.topics.mode "strimzi") .root.Values.topics.strimzi.users (eq .root.Values.topics.strimzi.authentication "scram-sha-512") }}
- name: TIDEGATE_KAFKA_SASL_USERNAME
  value: {{ include "tidegate.kafkaSecret" . }}
{{- end }}
{{- if $values.kafka.caSecret }}
- name: TIDEGATE_KAFKA_SSL_CA_LOCATION
  value: /etc/tidegate/kafka-ca/ca.crt
{{- end }}
- name: TIDEGATE_TOPICS_PRODUCTION
  value: {{ $values.topics.production | quote }}
- name: TIDEGATE_TOPICS_QUEUES
  value: {{ include "tidegate.queues" .root | quote }}
{{- range $group, $count := $values.topics.partitions }}
- name: TIDEGATE_TOPICS_PARTITIONS_{{ upper $group }}
  value: {{ $count | int | quote }}
{{- end }}
- name: POD_NAME
  valueFrom: {fieldRef: {fieldPath: metadata.name}}
- name: TIDEGATE_INSTANCE_ID
  value: $(POD_NAME)
{{- if .stateful }}
- name: POD_NAMESPACE
  valueFrom: {fieldRef: {fieldPath: metadata.namespace}}
# Kubernetes gives the name of a StatefulSet's pod to one pod at a time: proof that the one before it is dead.
- name: TIDEGATE_STATEFUL_POD
  value: $(POD_NAMESPACE)/$(POD_NAME)
{{- end }}
{{- if and $values.health.enabled (not (or .once .command)) }}
- name: TIDEGATE_HTTP_HOST
  value: {{ $values.health.host | quote }}
- name: TIDEGATE_HTTP_PORT
  value: {{ $values.health.port | int | quote }}
{{- end }}
{{- with .variables }}
{{ toYaml . }}
{{- end }}
{{- /* A service waits for its brokers, and is not ready. If it ended instead, Kubernetes would let it wait for minutes after they are back. */}}
{{- $given := dict }}
{{- if not (or .once .tool .command) }}{{ $_ := set $given "TIDEGATE_BROKER_WAIT_S" "86400" }}{{ end }}
{{- /* It ends by itself before it is killed. Executors, which drain for as long as their pool says, have a grace of their own. */}}
{{- $grace := (.service | default dict).terminationGracePeriodSeconds | default 60 | int }}
{{- if not (or .once .tool .command .grace (ge $grace 35)) }}{{ $_ := set $given "TIDEGATE_STOP_WITHIN_S" (sub $grace 5 | toString) }}{{ end }}
{{- range $name, $value := merge (dict) ((.service | default dict).env | default dict) $values.env $given }}
- name: {{ $name }}
  value: {{ $value | quote }}
{{- end }}
{{- end }}

{{/* Variables with which the ClickHouse server is asked, as a YAML list; none if there is none. Argument: the root. */}}
{{- define "tidegate.clickhouse" -}}
{{- $server := .Values.clickhouse }}
{{- $variables := list }}
{{- if $server.url }}
{{- $variables = append $variables (dict "name" "TIDEGATE_CLICKHOUSE_URL" "value" $server.url) }}
{{- $variables = append $variables (dict "name" "TIDEGATE_CLICKHOUSE_DATABASE" "value" $server.database) }}
{{- if $server.existingSecret }}
{{- range $name, $key := dict "TIDEGATE_CLICKHOUSE_USER" $server.userKey "TIDEGATE_CLICKHOUSE_PASSWORD" $server.passwordKey }}
{{- $variables = append $variables (dict "name" $name "valueFrom" (dict "secretKeyRef" (dict "name" $server.existingSecret "key" $key))) }}
{{- end }}
{{- end }}
{{- end }}
{{- toYaml $variables }}
{{- end }}

{{/* The same for who only asks for rows, also of an embedded ClickHouse that answers in the cluster. Argument: the root. */}}
{{- define "tidegate.rows" -}}
{{- if and (not .Values.clickhouse.url) .Values.projection.sql.enabled }}
{{- toYaml (list (dict "name" "TIDEGATE_SQL_URL" "value" (printf "http://%s:8123" (include "tidegate.name" (dict "root" . "component" "sql"))))) }}
{{- else }}
{{- include "tidegate.clickhouse" . }}
{{- end }}
{{- end }}

{{/* The queues that the pools of executors serve, comma-separated. */}}
{{- define "tidegate.queues" -}}
{{- $queues := list }}
{{- range .Values.executors }}{{ $queues = append $queues .queue }}{{ end }}
{{- $queues = $queues | default (list "default") }}
{{- if .Values.tests.run }}{{ $queues = append $queues .Values.tests.queue }}{{ end }}
{{- $queues | uniq | sortAlpha | join "," }}
{{- end }}

{{/* Where Kafka is: the one that is named, or the small one of `dev.kafka`. Argument: the root. */}}
{{- define "tidegate.bootstrap" -}}
{{- if .Values.dev.kafka.enabled }}{{ include "tidegate.name" (dict "root" . "component" "kafka") }}:9092{{ else }}{{ .Values.kafka.bootstrap }}{{ end }}
{{- end }}

{{/* The secret with a role's Kafka credentials; nothing if there is none. Argument: that of `tidegate.pod`. */}}
{{- define "tidegate.kafkaSecret" -}}
{{- $kafka := .root.Values.kafka }}
{{- $own := (.service | default dict).kafkaSecret | default (get $kafka.secrets (.role | default .component)) }}
{{- if $own }}{{ $own }}
{{- else if and (eq .root.Values.topics.mode "strimzi") .root.Values.topics.strimzi.users (not .noSecret) }}{{ include "tidegate.name" (dict "root" .root "component" (.role | default .component)) }}
{{- else if not .noSecret }}{{ $kafka.existingSecret }}
{{- end }}
{{- end }}

{{/* Which key of that secret is which setting, as YAML. Argument: that of `tidegate.pod`. */}}
{{- define "tidegate.secretKeys" -}}
{{- $topics := .root.Values.topics }}
{{- if .root.Values.kafka.secretKeys }}{{ toYaml .root.Values.kafka.secretKeys }}
{{- else if and (eq $topics.mode "strimzi") $topics.strimzi.users }}
{{- if eq $topics.strimzi.authentication "tls" }}
SSL_CERTIFICATE: user.crt
SSL_KEY: user.key
{{- else }}
SASL_PASSWORD: password
{{- end }}
{{- end }}
{{- end }}
